"""Matmul with packed quantized weights.

Lazy, because the formats and their sizes (`formats`) must not import jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from .formats import FORMATS, Format

if TYPE_CHECKING:
    from .api import BACKENDS, Weight, expert_matmul, quant_matmul, quant_matmuls, resolve, take_rows
    from .reference import dequantize

__all__ = [
    "BACKENDS",
    "FORMATS",
    "Format",
    "UnsupportedError",
    "Weight",
    "dequantize",
    "expert_matmul",
    "quant_matmul",
    "quant_matmuls",
    "resolve",
    "take_rows",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".reference" if name == "dequantize" else ".api", __name__), name)
