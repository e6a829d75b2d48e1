"""The config of a run: a file's `get_config()`, changed by `path=value` words, checked before any device.

loaded = load("configs/quickstart.py", ["optimizer=Lion", "optimizer.b1=0.95"])
check(loaded.config, num_devices=8)
"""

from mtx.config.checks import check
from mtx.config.cluster import Cluster
from mtx.config.loading import Loaded, load, workdir
from mtx.config.overrides import override
from mtx.config.printing import differences, dump, help_text, print_help, read_dump, text
from mtx.config.root import BatchConfig, Config, masks_of, microbatches, total_steps
from mtx.config.run_folder import read_config, versions, write_run_folder

__all__ = [
    "BatchConfig",
    "Cluster",
    "Config",
    "Loaded",
    "check",
    "differences",
    "dump",
    "help_text",
    "load",
    "masks_of",
    "microbatches",
    "override",
    "print_help",
    "read_config",
    "read_dump",
    "text",
    "total_steps",
    "versions",
    "workdir",
    "write_run_folder",
]
