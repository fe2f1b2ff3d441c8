"""Compiled programs kept on disk between runs, in a directory private to the user.

A compiled program is code: whoever may write to this directory may run code as its owner.
"""

import logging
import os
import shutil
import stat

import jax

from realm_jax.errors import DownloadError
from realm_jax.registry.store import cache_root

_log = logging.getLogger(__name__)

# Bytes: JAX writes in place, and what a full disk cuts short it would try to read, and complain about, ever after.
_SLACK = 64 << 20


def enable_compile_cache() -> None:
    """Points JAX at the user's cache, unless the user has chosen one. Where none can be had, says so and goes on."""
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]  # typed since jax 0.12
        return
    try:
        path = cache_root() / "xla"
    except DownloadError as error:
        _log.warning("compiled programs are not cached: %s", error)
        return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
            _log.warning("compiled programs are not cached: %s does not belong to this user", path)
            return
        if stat.S_IMODE(status.st_mode) & 0o077:
            path.chmod(0o700)
        if shutil.disk_usage(path).free < _SLACK:
            _log.warning("compiled programs are not cached: the disk of %s is almost full", path)
            return
    except OSError as error:
        _log.warning("compiled programs are not cached: %s: %s", path, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
