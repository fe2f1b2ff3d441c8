"""Which kernels a user's choice of backend stands for."""

import logging
from functools import cache

import jax

from pallas_kernels import native
from realm_jax.errors import BackendError

_log = logging.getLogger(__name__)
BACKENDS = ("auto", "xla", "native", "pallas")


def resolve_backend(name: str) -> str:
    """The name the kernels know a user's choice by: "native", "xla", "gpu", "tpu" or "auto".

    "auto" is the native kernels on a CPU where they were built, XLA on one without, and "auto" elsewhere: each kernel
    then takes what serves the case. Raises BackendError when the choice is not available here, with the reason.
    """
    platform = jax.default_backend()
    if name == "auto":
        if platform != "cpu":
            return "auto"
        if native.available():
            return "native"
        _say(f"{native.why_not()}; until then XLA serves, at a fraction of the speed")
        return "xla"
    if name == "xla":
        return name
    if name == "native":
        if not native.available():
            raise BackendError(f"backend 'native' is not available: {native.why_not()}")
        return name
    if name == "pallas":
        if platform in ("gpu", "tpu"):
            return platform
        raise BackendError(f"backend 'pallas' needs a GPU or a TPU, and JAX computes on {platform} here")
    raise BackendError(f"backend is {name!r}; accepted: {', '.join(BACKENDS)}")


@cache
def _say(message: str) -> None:
    """Logs a warning, once a process."""
    _log.warning(message)
