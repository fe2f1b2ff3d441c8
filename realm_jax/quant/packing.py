"""From a tensor's bytes in the file to the arrays the kernels read, in numpy, a few megabytes at a time."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pallas_kernels.quant_matmul import native
from pallas_kernels.quant_matmul.formats import FORMATS, Format
from realm_jax.errors import GGUFError, UnsupportedModelError

from .blocks import BLOCKS

CHUNK_BYTES = 1 << 20  # of the file: temporaries are a small multiple of it for each thread, whatever the tensor's size
MAX_THREADS = 8


def format_of(type: Any) -> Format:
    """The packed format of a ggml type (GGMLType, or its name). UnsupportedModelError when there is none."""
    name = type if isinstance(type, str) else type.name
    if name not in BLOCKS:
        raise UnsupportedModelError(f"tensor type {name}: not implemented; accepted: {', '.join(sorted(BLOCKS))}")
    return FORMATS[name]


def packed_spec(
    shape: tuple[int, ...], type: Any, *, tiled: bool = False
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of the arrays of a tensor of logical ``shape`` [..., K], to allocate them before ``pack``.

    tiled: in the layout of the native kernels, which a matrix [..., N, K] of a quantized type can have. Raises
    GGUFError when K is no multiple of the type's block.
    """
    fmt, shape = format_of(type), tuple(int(n) for n in shape)
    try:
        return native.tile_spec(shape, fmt) if tiled else fmt.spec(shape)
    except ValueError as e:
        raise GGUFError(str(e)) from e


def pack(
    data: np.ndarray,
    shape: tuple[int, ...],
    type: Any,
    out: dict[str, np.ndarray] | None = None,
    *,
    tiled: bool = False,
) -> dict[str, np.ndarray]:
    """The bytes of a tensor -> its packed arrays.

    data: uint8 [nbytes], may be a view of a memory map. shape: logical, outermost first. out: arrays (or views into a
    preallocated stack) of packed_spec's shapes and dtypes, written in place and returned. tiled: as in packed_spec.
    Raises GGUFError when the byte count does not match the shape, UnsupportedModelError for an unknown type.
    """
    fmt = format_of(type)
    spec = packed_spec(shape, type, tiled=tiled)
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

    def packed(first: int, last: int) -> dict[str, np.ndarray]:
        """Rows first..last-1, each array [rows, width]."""
        planes = {}
        for name, values in unpack(source[first:last].reshape(-1, size)).items():
            values = values.reshape(last - first, -1)
            if name in ("codes", "high") and values.dtype != np.int8:  # words, which the packers make as bytes
                values = np.ascontiguousarray(values).view(np.uint32)
            planes[name] = values
        return planes

    step = max(1, CHUNK_BYTES // max(1, per_row * size))
    if tiled:
        _pack_tiles(out["tiles"], rows, shape, fmt, packed, -(-step // native.ROWS) * native.ROWS)
        return out
    flat = {name: _rows_view(a, rows) for name, a in out.items()}

    def write(at: int) -> None:
        for name, values in packed(at, min(at + step, rows)).items():
            flat[name][at : at + step] = values

    _for_each(range(0, rows, step), write)
    return out


def tile(
    rows: dict[str, np.ndarray], shape: tuple[int, ...], type: Any, out: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The packed arrays of a matrix [..., N, K] in rows -> in tiles, in ``out``, which packed_spec describes."""
    count = math.prod(shape[:-1])
    flat = {name: _rows_view(a, count) for name, a in rows.items()}
    step = max(1, CHUNK_BYTES // max(1, sum(a[0].nbytes for a in flat.values())))

    def some(first: int, last: int) -> dict[str, np.ndarray]:
        return {name: a[first:last] for name, a in flat.items()}

    _pack_tiles(out["tiles"], count, shape, format_of(type), some, -(-step // native.ROWS) * native.ROWS)
    return out


def _pack_tiles(
    out: np.ndarray,
    rows: int,
    shape: tuple[int, ...],
    fmt: Format,
    packed: Callable[[int, int], dict[str, np.ndarray]],
    step: int,
) -> None:
    """Every matrix of [..., N, K] into its tiles, step rows at a time."""
    n = shape[-2]
    matrices = out.reshape(-1, *out.shape[-2:])
    if not np.shares_memory(matrices, out):
        raise ValueError("out arrays must be contiguous in their leading axes")
    starts = range(0, n, step)

    def write(job: int) -> None:
        i, at = job // len(starts), starts[job % len(starts)]
        end = min(at + step, n)
        into = matrices[i, at // native.ROWS : -(-end // native.ROWS)]
        native.tile(packed(i * n + at, i * n + end), fmt, into)

    _for_each(range(rows // n * len(starts)), write)


def _for_each(jobs: Sequence[int], run: Callable[[int], None]) -> None:
    """Runs the jobs on the threads this process may use: numpy and the native kernels compute without the GIL."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(len(jobs), cores, MAX_THREADS)
    if threads < 2:
        for job in jobs:
            run(job)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, jobs))


def _rows_view(a: np.ndarray, rows: int) -> np.ndarray:
    """a [..., width] as [rows, width] without a copy."""
    view = a.reshape(rows, a.shape[-1] if a.ndim else 1)
    if not np.shares_memory(view, a):
        raise ValueError("out arrays must be contiguous in their leading axes")
    return view
