"""Dequantization and matmul in the plainest form: what every backend is tested against.

The functions take numpy arrays (and then compute in numpy, subnormals included) or jax arrays.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .formats import Format

IQ1_DELTA = 0.125


class Groups(NamedTuple):
    """What elements share: scale, offset (added) float32 [..., K/group], delta float32 [..., K/8], or None."""

    scale: Any
    offset: Any = None
    delta: Any = None


def dequantize(arrays: dict[str, Any], fmt: Format) -> Any:
    """Packed arrays [..., N, *] -> float32 [..., N, K], the same operations in the same precision as ggml.

    Bit-exact with ggml's C and gguf-py. Source of each type's meaning: ggml-quants.c.
    """
    if fmt.dense:
        return arrays["values"].astype(np.float32)
    return elements(arrays, group_parameters(arrays, fmt), fmt)


def matmul(x: jax.Array, arrays: dict[str, Any], fmt: Format) -> jax.Array:
    """x [..., K] float32 times a weight [N, K] -> float32 [..., N], through the whole dequantized weight."""
    return jnp.einsum("...k,nk->...n", x, dequantize(arrays, fmt), precision="highest")


def elements(arrays: dict[str, Any], groups: Groups, fmt: Format, one: Any = 1) -> Any:
    """scale * (value(code) + delta) + offset of every element: float32 [..., N, K].

    one: the number 1, as a uint32 that a compiler may be kept from seeing through.
    """
    xp = _module(arrays)
    codes = _codes(arrays, fmt, xp, one)  # [..., N, K]
    *lead, k = codes.shape
    if fmt.table is not None:
        values = _lookup(codes, fmt.table, xp)
    else:  # by way of int32, as float32 vectors are made from signed integers
        values = codes.astype(xp.int32).astype(xp.float32)
        if fmt.bias:
            values = values - xp.float32(fmt.bias)
    if groups.delta is not None:
        values = values.reshape(*lead, -1, 8) + groups.delta[..., None]
    values = values.reshape(*lead, k // fmt.group, fmt.group)
    with np.errstate(over="ignore", invalid="ignore"):
        out = groups.scale[..., None] * values
        if groups.offset is not None:
            out = out + groups.offset[..., None]
    return out.reshape(*lead, k)


def group_parameters(arrays: dict[str, Any], fmt: Format) -> Groups:
    """Scales, offsets and deltas of a quantized format, decoded from their stored form."""
    xp = _module(arrays)
    stored = arrays["scales"]
    if fmt.scale == "e8m0":
        return Groups(_e8m0(stored, xp))
    if fmt.scale == "ue4m3":
        return Groups(_ue4m3(stored, xp))
    delta = None
    if fmt.scale == "iq1s":  # scale in bits 0-2, delta's sign in bit 3, for 32 elements
        signs = xp.repeat(stored >> xp.uint8(3), 4, axis=-1) & xp.uint8(1)
    elif fmt.scale == "iq1m":  # scale in bits 0-2, delta's signs of the two halves in bits 3 and 4, for 16 elements
        signs = (stored[..., None] >> (_steps(xp.uint8, 2, xp) + xp.uint8(3))) & xp.uint8(1)
        signs = signs.reshape(*stored.shape[:-1], -1)
    if fmt.scale in ("iq1s", "iq1m"):
        delta = xp.where(signs != 0, xp.float32(-IQ1_DELTA), xp.float32(IQ1_DELTA))
        stored = stored & xp.uint8(7)
    with np.errstate(over="ignore", invalid="ignore"):
        scale, offset = _integers(stored, fmt.scale, xp), None
        if fmt.has_super:
            if (fmt.scale_mul, fmt.scale_add) != (1.0, 0.0):
                scale = scale * xp.float32(fmt.scale_mul) + xp.float32(fmt.scale_add)
            scale = _times_block(scale, arrays["super"], fmt, xp)
        if fmt.mins == "f16":
            offset = arrays["mins"].astype(xp.float32)
        elif fmt.mins is not None:
            mins = _integers(arrays["mins"], fmt.mins, xp)
            offset = -_times_block(mins, arrays["super_mins"], fmt, xp)
    return Groups(scale, offset, delta)


def _module(arrays: dict[str, Any]) -> Any:
    return np if all(isinstance(a, np.ndarray) for a in arrays.values()) else jnp


def _codes(arrays: dict[str, Any], fmt: Format, xp: Any, one: Any) -> Any:
    """The planes put together: [..., N, K] int8, or uint32 holding the code."""
    if fmt.planes == (8,):
        return arrays["codes"]
    out = _unpack(arrays["codes"], fmt.planes[0], xp, one)
    if len(fmt.planes) == 2:
        out = out | (_unpack(arrays["high"], fmt.planes[1], xp, one) << xp.uint32(fmt.planes[0]))
    return out


def _unpack(plane: Any, bits: int, xp: Any, one: Any) -> Any:
    """uint32 [..., K*bits/32] -> uint32 [..., K], a code each."""
    parts = plane[..., None] >> _steps(xp.uint32, 32 // bits, xp) * (xp.uint32(bits) * xp.uint32(one))
    return (parts & xp.uint32((1 << bits) - 1)).reshape(*plane.shape[:-1], -1)


def _steps(dtype: Any, count: int, xp: Any) -> Any:
    """0, 1, ... count-1: an iota under jax, so that no constant array enters the jaxpr."""
    return np.arange(count, dtype=dtype) if xp is np else lax.iota(dtype, count)


def _lookup(codes: Any, table: tuple[int, ...], xp: Any) -> Any:
    """table[codes] as float32. Under jax a tree of selects: XLA's gather is scalar on the CPU, selects are vectors."""
    if xp is np:
        return np.array(table, np.float32)[codes]
    level = [jnp.float32(v) for v in table]
    bit = 0
    while len(level) > 1:
        odd = (codes >> jnp.uint32(bit)) & jnp.uint32(1) != 0
        level = [jnp.where(odd, hi, lo) for lo, hi in zip(level[::2], level[1::2])]
        bit += 1
    return level[0]


def _integers(stored: Any, kind: str, xp: Any) -> Any:
    """Stored group numbers as float32 [..., K/group]."""
    if kind == "u4":  # group 2i in the low nibble of byte i, group 2i+1 in the high one
        pairs = stored[..., None] >> _steps(xp.uint8, 2, xp) * xp.uint8(4)
        stored = (pairs & xp.uint8(15)).reshape(*stored.shape[:-1], -1)
    return stored.astype(xp.float32)


def _times_block(groups: Any, per_block: Any, fmt: Format, xp: Any) -> Any:
    """groups [..., K/group] times per_block [..., K/block] float16 -> [..., K/group]."""
    split = groups.reshape(*per_block.shape, fmt.block // fmt.group)
    return (per_block.astype(xp.float32)[..., None] * split).reshape(groups.shape)


def _e8m0(stored: Any, xp: Any) -> Any:
    """2^(e-128): half the power, as the table holds doubled values. e of 0 and 1 are subnormal."""
    wide = stored.astype(xp.uint32)
    return _from_bits(xp.where(wide < 2, xp.uint32(0x00200000) << wide, (wide - xp.uint32(1)) << xp.uint32(23)), xp)


def _ue4m3(stored: Any, xp: Any) -> Any:
    """Four exponent bits (bias 7) and three of mantissa, halved for the doubled table. Bit 7 is ignored; 0x7F is 0."""
    wide = stored.astype(xp.uint32)
    exponent, mantissa = (wide >> xp.uint32(3)) & xp.uint32(15), wide & xp.uint32(7)
    normal = _from_bits(((exponent + xp.uint32(119)) << xp.uint32(23)) | (mantissa << xp.uint32(20)), xp)
    scale = xp.where(exponent == 0, mantissa.astype(xp.float32) * xp.float32(2.0**-10), normal)
    return xp.where(stored == 0x7F, xp.float32(0), scale)


def _from_bits(bits: Any, xp: Any) -> Any:
    return bits.view(np.float32) if xp is np else lax.bitcast_convert_type(bits, jnp.float32)
