"""Matmul with packed quantized weights."""

from ..errors import UnsupportedError
from .api import BACKENDS, expert_matmul, quant_matmul, resolve, take_rows
from .formats import FORMATS, Format
from .reference import dequantize

__all__ = [
    "BACKENDS",
    "FORMATS",
    "Format",
    "UnsupportedError",
    "dequantize",
    "expert_matmul",
    "quant_matmul",
    "resolve",
    "take_rows",
]
