"""Our text and shards for other programs: as a TFDS dataset, as seqio Tasks."""
