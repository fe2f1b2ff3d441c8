"""The native backend, on CPUs: weights as tiles of 16 interleaved rows, activations as int8 in groups of 32.

A tiled weight is one array {"tiles": uint8 [..., ceil(N/16), bytes of a tile]} (layout: native/format.h); it does not
know N, which every operation takes. One numerics class: an output's bits depend on its row of x and its row of the
weight only (native/kernels_isa.cc says how it is summed). NMSE from the float32 product: about 3e-5.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.native import available, isa, library, register, why_not

from .formats import Format

ROWS = 16  # of a tile
TRANSPOSED_ROWS = 512  # dequantized at once for a gradient

Arrays = dict[str, Any]
Weight = tuple[Arrays, Format, int]  # arrays, format, N


@cache
def _numbers() -> dict[str, int]:
    """Format name -> its number in the library."""
    name_of = library().realm_quant_format_name
    name_of.restype = ctypes.c_char_p
    numbers: dict[str, int] = {}
    while (name := name_of(len(numbers))) is not None:
        numbers[name.decode()] = len(numbers)
    return numbers


def unsupported(fmt: Format) -> str | None:
    """Why weights of this format cannot be tiled here; None when they can."""
    if not available():
        return why_not()
    if fmt.name not in _numbers():
        return f"the native kernels take quantized weights, not {fmt.name}"
    return None


def tile_spec(shape: tuple[int, ...], fmt: Format) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the arrays of a tiled weight of logical shape [..., N, K]."""
    *lead, n, k = shape
    if k % fmt.block:
        raise ValueError(f"{fmt.name}: a row of {k} elements is not a multiple of the block of {fmt.block}")
    tile_bytes = library().realm_quant_tile_bytes
    tile_bytes.restype = ctypes.c_int64
    width = tile_bytes(_numbers()[fmt.name], ctypes.c_int64(k))
    return {"tiles": ((*lead, -(-n // ROWS), width), np.dtype(np.uint8))}


def columns(arrays: Arrays, fmt: Format) -> int:
    """K of a tiled weight."""
    [(_, width)] = [tile_spec((ROWS, fmt.block), fmt)["tiles"][0]]
    return arrays["tiles"].shape[-1] // width * fmt.block


def tile(rows: dict[str, np.ndarray], fmt: Format, out: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Row-major numpy arrays of a weight [N, K], as Format.spec -> its tiles, in ``out`` [tiles, width] if given."""
    n, k = next(iter(rows.values())).shape[0], fmt.columns(rows)
    shape, dtype = tile_spec((n, k), fmt)["tiles"]
    if out is None:
        out = np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype}{out.shape}, expected contiguous {dtype}{shape}")
    planes = {name: np.ascontiguousarray(a) for name, a in rows.items()}
    names = ("codes", "high", "scales", "mins", "super", "super_mins")
    pointers = [ctypes.c_void_p(planes[name].ctypes.data if name in planes else None) for name in names]
    size = (ctypes.c_int64(n), ctypes.c_int64(k))
    library().realm_quant_tile(_numbers()[fmt.name], *size, *pointers, ctypes.c_void_p(out.ctypes.data))
    return {"tiles": out}


def matmul(x: jax.Array, weights: Sequence[Weight], lead: tuple[Any, ...]) -> list[jax.Array]:
    """x [M, K] float32 times each weight of ``lead`` (nothing, or a layer each) -> [M, N] float32 each."""
    outs = [jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32) for _, _, n in weights]
    places = lead or (None,) * len(weights)
    args = [a for (arrays, _, _), place in zip(weights, places) for a in (_index(place), arrays["tiles"])]
    formats = np.array([_numbers()[fmt.name] for _, fmt, _ in weights], np.int64)
    return list(_call("realm_quant_matmul", outs)(x, *args, formats=formats, isa=np.int64(isa())))


def expert_matmul(x: jax.Array, ids: jax.Array, weight: Weight, lead: tuple[Any, ...]) -> jax.Array:
    """Row i of x [M, K] float32 times expert ids[i] (int32 [M]) of [..., E, N, K] -> [M, N] float32."""
    arrays, fmt, n = weight
    out = jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32)
    attributes = {"format": np.int64(_numbers()[fmt.name]), "isa": np.int64(isa())}
    return _call("realm_quant_expert_matmul", out)(
        x, ids, _index(lead[0] if lead else None), arrays["tiles"], **attributes
    )


def rows(ids: jax.Array, weight: Weight, index: Any = None) -> jax.Array:
    """Rows ``ids`` [R] int32 (clamped) of weight ``index`` of a stack, dequantized bit for bit -> [R, K] float32."""
    arrays, fmt, n = weight
    out = jax.ShapeDtypeStruct((ids.shape[0], columns(arrays, fmt)), jnp.float32)
    attributes = {"format": np.int64(_numbers()[fmt.name]), "n": np.int64(n), "isa": np.int64(isa())}
    return _call("realm_quant_rows", out)(ids, _index(index), arrays["tiles"], **attributes)


def matmul_transposed(g: jax.Array, weight: Weight, index: Any = None) -> jax.Array:
    """g [M, N] float32 times weight ``index`` [N, K] -> [M, K] float32: the gradient with respect to x, in float32."""
    arrays, fmt, n = weight
    size = min(TRANSPOSED_ROWS, n)

    def step(i, out):
        first = i * size
        at = first + jnp.arange(size, dtype=jnp.int32)
        part = jnp.where(at < n, g[:, jnp.minimum(at, n - 1)], 0.0)
        return out + jnp.matmul(part, rows(at, weight, index), precision=lax.Precision.HIGHEST)

    start = jnp.zeros((g.shape[0], columns(arrays, fmt)), jnp.float32)
    return lax.fori_loop(0, -(-n // size), step, start)


def _index(value: Any) -> jax.Array:
    return jnp.asarray(0 if value is None else value, jnp.int32).reshape(1)


def _call(name: str, outs: Any) -> Any:
    return jax.ffi.ffi_call(register(name), outs, vmap_method="sequential")
