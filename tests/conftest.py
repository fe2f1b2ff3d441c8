"""What all tests share: where JAX runs and caches, and the small real model."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports jax. The programs that tests compile are shared by the session's processes, and then removed.
_COMPILED = tempfile.TemporaryDirectory(prefix="realm-test-")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Started in the background of a script, a process ignores Ctrl-C, and so do its children: the tests of it need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs() -> Iterator[Path]:
    yield Path(_COMPILED.name)
    _COMPILED.cleanup()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The small default model, SmolLM2-135M-Instruct Q4_1: the file REALM_TEST_MODEL names, else from the registry,
    which fetches it once into the user's cache."""
    named = os.environ.get("REALM_TEST_MODEL")
    if named:
        return Path(named)
    from realm_jax import registry

    return registry.resolve()
