"""Finding, checking and loading the shared library."""

import ctypes
import os
from functools import cache
from pathlib import Path

import jax

ISAS = ("plain", "avx2", "avx512")  # in the order of realm_native_isa()
VERSION = 1  # of the interface; must equal realm_native_version()
_PATH = Path(__file__).with_name("realm_native.so")


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why."""
    if not _PATH.exists():
        return (
            None,
            "the native CPU kernels were not built; install a C++ compiler (g++ or clang++) and the package again",
        )
    try:
        lib = ctypes.CDLL(str(_PATH))
    except OSError as error:
        return None, f"the native CPU kernels do not load ({error}); install the package again"
    if lib.realm_native_version() != VERSION:
        return None, "the native CPU kernels are of another version than the package; install the package again"
    return lib, ""


def available() -> bool:
    """Is the library there, and is the CPU the platform that JAX computes on?"""
    return not why_not()


def why_not() -> str:
    """Why the native kernels cannot be used here, in one line; empty when they can."""
    problem = _load()[1]
    if not problem and jax.default_backend() != "cpu":
        return f"the native kernels run on CPUs, and JAX computes on {jax.default_backend()} here"
    return problem


def library() -> ctypes.CDLL:
    """The loaded library. RuntimeError with the reason when there is none."""
    lib, problem = _load()
    if lib is None:
        raise RuntimeError(problem)
    return lib


@cache
def isa() -> int:
    """The instruction set to use, an index into ISAS: the widest there is, or a narrower one by REALM_NATIVE_ISA."""
    widest = library().realm_native_isa()
    wanted = os.environ.get("REALM_NATIVE_ISA")
    if wanted is None:
        return widest
    if wanted not in ISAS[: widest + 1]:
        raise RuntimeError(f"REALM_NATIVE_ISA is {wanted!r}; accepted on this machine: {', '.join(ISAS[: widest + 1])}")
    return ISAS.index(wanted)


@cache
def register(name: str) -> str:
    """Makes the library's XLA FFI handler ``name`` known to JAX and returns the name it has there."""
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library(), name)), platform="cpu")
    return name
