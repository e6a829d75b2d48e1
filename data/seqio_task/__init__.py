"""seqio's Tasks and Mixtures as sources: `SeqioTask`, compiled to shards, or read `Live` in the training process."""

from data.seqio_task.config import Live, SeqioTask
from data.seqio_task.live import LiveLoader, LiveText

__all__ = ["Live", "LiveLoader", "LiveText", "SeqioTask"]
