"""Matmul with packed quantized weights."""

from ..errors import UnsupportedError
from .api import BACKENDS, Weight, expert_matmul, quant_matmul, quant_matmuls, resolve, take_rows
from .formats import FORMATS, Format
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
