"""From text to token shards: source.py says how a new source is written, run.py how its shards come about."""
