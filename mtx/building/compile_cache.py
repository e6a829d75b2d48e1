"""The compile cache."""

import logging
import os
import stat
from pathlib import Path

import jax

log = logging.getLogger("mtx")


def keep_compiled() -> None:
    """A compile cache that outlives the process, where JAX was not given one. Asks for the devices.

    Whoever can write to it can run code as its user: it is used only if nobody else can. Not for several CPU devices,
    from jax 0.11 on: XLA's CPU programs forget, once written and loaded back, in what order collectives of nested loops
    and conditions ran, so that devices may mix them up and hang. Compiled in the process they keep it.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1 and jax.__version_info__ >= (0, 11):
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtx" / "compile"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        log.warning("nothing compiled is kept for the next start: %s", error)
        return
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        log.warning("the compile cache %s is not used: others can write to it, and may have. Remove it.", folder)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
