"""seqio's Tasks and Mixtures as sources: `SeqioTask`, compiled to shards, or read `Live` in the training process."""

from data.sources.seqio_task.config import SeqioTask
from data.sources.seqio_task.live import LiveLoader, LiveText
from data.sources.seqio_task.task import Live

__all__ = ["Live", "LiveLoader", "LiveText", "SeqioTask"]
