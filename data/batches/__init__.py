"""From token shards to batches: which row is sample i, what is in it, and what is learned of it."""
