"""Dequantization and matmul in the plainest form: what every backend is tested against.

The functions take numpy arrays (and then compute in numpy, subnormals included) or jax arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .formats import Format

IQ1_DELTA = 0.125


def dequantize(arrays: dict[str, Any], fmt: Format) -> Any:
    """Packed arrays [..., N, *] -> float32 [..., N, K], the same operations in the same precision as ggml.

    Bit-exact with ggml's C and gguf-py. Source of each type's meaning: ggml-quants.c.
    """
    xp = np if all(isinstance(a, np.ndarray) for a in arrays.values()) else jnp
    if fmt.dense:
        return arrays["values"].astype(xp.float32)
    codes = _codes(arrays, fmt, xp)  # [..., N, K]
    *lead, k = codes.shape
    if fmt.table is None:
        values = codes.astype(xp.float32)
        if fmt.bias:
            values = values - xp.float32(fmt.bias)
    else:
        values = _lookup(codes, fmt.table, xp)
    values = values.reshape(*lead, k // fmt.group, fmt.group)
    with np.errstate(over="ignore", invalid="ignore"):
        scales, delta = _scales(arrays, fmt, xp)  # [..., N, K/group]
        if delta is not None:
            values = (values.reshape(*lead, -1, 8) + delta[..., None]).reshape(values.shape)
        out = scales[..., None] * values
        if fmt.mins == "f16":
            out = out + arrays["mins"].astype(xp.float32)[..., None]
        elif fmt.mins is not None:
            mins = _small(arrays["mins"], fmt.mins, xp)
            out = out - _per_block(arrays["super_mins"], mins, fmt, xp)[..., None]
    return out.reshape(*lead, k)


def matmul(x: jax.Array, arrays: dict[str, Any], fmt: Format) -> jax.Array:
    """x [..., K] float32 times a weight [N, K] -> float32 [..., N], through the whole dequantized weight."""
    return jnp.einsum("...k,nk->...n", x, dequantize(arrays, fmt), precision="highest")


def _codes(arrays, fmt: Format, xp):
    """The planes put together: int8 or uint8 [..., N, K]."""
    if fmt.planes == (8,):
        return arrays["codes"]
    out, below = None, 0
    for name, bits in zip(("codes", "high"), fmt.planes):
        plane = _unpack(arrays[name], bits, fmt.block, xp)
        out = plane if out is None else out | (plane << xp.uint8(below))
        below += bits
    return out


def _unpack(plane, bits: int, block: int, xp):
    """uint8 [..., K*bits/8] -> uint8 [..., K]; see formats.py for the order inside a block."""
    *lead, width = plane.shape
    stride = block * bits // 8
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]  # [8/bits, 1]
    parts = plane.reshape(*lead, width // stride, 1, stride) >> shifts
    return (parts & xp.uint8((1 << bits) - 1)).reshape(*lead, width * 8 // bits)


def _lookup(codes, table: tuple[int, ...], xp):
    """table[codes] as float32. Under jax a tree of selects: XLA's gather is scalar on the CPU, selects are vectors."""
    if xp is np:
        return np.array(table, np.float32)[codes]
    level = [jnp.float32(v) for v in table]
    bit = 0
    while len(level) > 1:
        odd = (codes >> jnp.uint8(bit)) & jnp.uint8(1) != 0
        level = [jnp.where(odd, hi, lo) for lo, hi in zip(level[::2], level[1::2])]
        bit += 1
    return level[0]


def _small(stored, kind: str, xp):
    """Group integers as float32 [..., K/group]."""
    if kind == "u4":  # group 2i in the low nibble of byte i, group 2i+1 in the high one
        pairs = stored[..., None] >> np.array([0, 4], np.uint8)
        stored = (pairs & xp.uint8(15)).reshape(*stored.shape[:-1], -1)
    return stored.astype(xp.float32)


def _per_block(per_block, small, fmt: Format, xp):
    """per_block [..., K/block] float16 times small [..., K/group] -> [..., K/group]."""
    groups = small.reshape(*per_block.shape, fmt.block // fmt.group)
    return (per_block.astype(xp.float32)[..., None] * groups).reshape(small.shape)


def _scales(arrays, fmt: Format, xp):
    """(scales [..., K/group] float32, delta [..., K/8] float32 or None)."""
    stored = arrays["scales"]
    delta = None
    if fmt.scale == "e8m0":  # half of 2^(e-127), as the table holds doubled values; e of 0 and 1 are subnormal
        wide = stored.astype(xp.uint32)
        bits = xp.where(wide < 2, xp.uint32(0x00200000) << wide, (wide - xp.uint32(1)) << xp.uint32(23))
        return _from_bits(bits, xp), None
    if (
        fmt.scale == "ue4m3"
    ):  # 4 exponent bits (bias 7), 3 mantissa bits, halved for the doubled table; bit 7 is ignored
        wide = stored.astype(xp.uint32)
        exponent, mantissa = (wide >> xp.uint32(3)) & xp.uint32(15), wide & xp.uint32(7)
        normal = _from_bits(((exponent + xp.uint32(119)) << xp.uint32(23)) | (mantissa << xp.uint32(20)), xp)
        scales = xp.where(exponent == 0, mantissa.astype(xp.float32) * xp.float32(2.0**-10), normal)
        return xp.where(stored == 0x7F, xp.float32(0), scales), None
    if fmt.scale == "iq1s":  # scale in bits 0-2, delta's sign in bit 3, for 32 elements
        signs = xp.repeat(stored >> xp.uint8(3), 4, axis=-1) & xp.uint8(1)
    elif fmt.scale == "iq1m":  # scale in bits 0-2, delta's signs of the two halves in bits 3 and 4, for 16 elements
        signs = ((stored[..., None] >> np.array([3, 4], np.uint8)) & xp.uint8(1)).reshape(*stored.shape[:-1], -1)
    if fmt.scale.startswith("iq1"):
        delta = xp.where(signs != 0, xp.float32(-IQ1_DELTA), xp.float32(IQ1_DELTA))
        stored = stored & xp.uint8(7)
    scales = _small(stored, fmt.scale, xp)
    if fmt.has_super:
        if (fmt.scale_mul, fmt.scale_add) != (1.0, 0.0):
            scales = scales * xp.float32(fmt.scale_mul) + xp.float32(fmt.scale_add)
        scales = _per_block(arrays["super"], scales, fmt, xp)
    return scales, delta


def _from_bits(bits, xp):
    return bits.view(np.float32) if xp is np else jax.lax.bitcast_convert_type(bits, jnp.float32)
