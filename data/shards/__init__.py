"""Token shards on disk: their format, which is Megatron-LM's, their index, and the manifest of a folder of them."""
