"""From a tensor's bytes in the file to the arrays the kernels read, in numpy, a few megabytes at a time."""

import math
from typing import Any

import numpy as np

from pallas_kernels.quant_matmul.formats import FORMATS, Format
from realm_jax.errors import GGUFError, UnsupportedModelError

from .blocks import BLOCKS

CHUNK_BYTES = 1 << 20  # of the file: temporaries are a small multiple of it, whatever the tensor's size


def format_of(type: Any) -> Format:
    """The packed format of a ggml type (GGMLType, or its name). UnsupportedModelError when there is none."""
    name = type if isinstance(type, str) else type.name
    if name not in BLOCKS:
        raise UnsupportedModelError(f"tensor type {name}: not implemented; accepted: {', '.join(sorted(BLOCKS))}")
    return FORMATS[name]


def packed_spec(shape: tuple[int, ...], type: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of the arrays of a tensor of logical ``shape`` [..., K], to allocate them before ``pack``.

    Raises GGUFError when K is no multiple of the type's block.
    """
    try:
        return format_of(type).spec(tuple(int(n) for n in shape))
    except ValueError as e:
        raise GGUFError(str(e)) from e


def pack(
    data: np.ndarray, shape: tuple[int, ...], type: Any, out: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The bytes of a tensor -> its packed arrays.

    data: uint8 [nbytes], may be a view of a memory map. shape: logical, outermost first. out: arrays (or views into a
    preallocated stack) of packed_spec's shapes and dtypes, written in place and returned. Raises GGUFError when the
    byte count does not match the shape, UnsupportedModelError for an unknown type.
    """
    fmt = format_of(type)
    spec = packed_spec(shape, type)
    size, unpack = BLOCKS[fmt.name]
    blocks = math.prod(shape) // fmt.block
    if data.dtype != np.uint8 or data.ndim != 1 or data.size != blocks * size:
        raise GGUFError(
            f"{fmt.name} tensor of shape {tuple(shape)}: {data.size} bytes of data, expected {blocks * size}"
        )
    if out is None:
        out = {name: np.empty(s, dtype) for name, (s, dtype) in spec.items()}
    for name, (s, dtype) in spec.items():
        if out[name].shape != s or out[name].dtype != dtype:
            raise ValueError(f"out[{name!r}] is {out[name].dtype}{out[name].shape}, expected {dtype}{s}")
    rows = math.prod(shape[:-1])
    per_row = blocks // max(rows, 1)  # blocks in a row
    source = data.reshape(rows, per_row * size)
    flat = {name: _rows_view(a, rows) for name, a in out.items()}
    step = max(1, CHUNK_BYTES // max(1, per_row * size))
    for at in range(0, rows, step):
        part = source[at : at + step]
        for name, values in unpack(part.reshape(-1, size)).items():
            target = flat[name][at : at + step]
            if target.dtype == np.uint32:  # a plane of codes, which the packers make as bytes
                target = target.view(np.uint8)
            target[...] = values.reshape(part.shape[0], -1)
    return out


def _rows_view(a: np.ndarray, rows: int) -> np.ndarray:
    """a [..., width] as [rows, width] without a copy."""
    view = a.reshape(rows, a.shape[-1] if a.ndim else 1)
    if not np.shares_memory(view, a):
        raise ValueError("out arrays must be contiguous in their leading axes")
    return view
