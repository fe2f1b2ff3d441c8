"""The native CPU kernels: one shared library, built when the package was installed, called by XLA."""

from .library import ISAS, available, isa, library, register, why_not

__all__ = ["ISAS", "available", "isa", "library", "register", "why_not"]
