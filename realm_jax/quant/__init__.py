"""Quantized weights: from the file's blocks to the kernels' arrays."""

from .packing import format_of, pack, packed_spec, tile
from .tensor import QuantizedTensor, matmuls

__all__ = ["QuantizedTensor", "format_of", "matmuls", "pack", "packed_spec", "tile"]
