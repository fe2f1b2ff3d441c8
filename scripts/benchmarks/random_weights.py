"""Random arrays in the kernels' layouts, made at the speed of memory: no file, no quantizer."""

from typing import Any

import jax
import numpy as np

from pallas_kernels.quant_matmul import Format, dequantize, native

Arrays = dict[str, np.ndarray]


def on_host() -> Any:
    """A context in which JAX computes on the CPU, where it need not compile every small operation for a GPU."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def random_rows(fmt: Format, n: int, k: int, rng: np.random.Generator) -> Arrays:
    """A weight [N, K] in rows, of any format: all codes alike often, values of a deviation about 1 / sqrt(K)."""
    arrays: Arrays = {}
    for name, (shape, dtype) in fmt.spec((n, k)).items():
        if dtype.kind == "f" or dtype.name == "bfloat16":
            size = 0.02 if name in ("scales", "super", "values") else 0.1
            arrays[name] = (size * (0.5 + rng.random(shape, np.float32))).astype(dtype)
        elif fmt.scale == "e8m0" and name == "scales":
            arrays[name] = rng.integers(118, 124, shape, np.uint8)  # powers of two
        elif fmt.scale == "ue4m3" and name == "scales":
            arrays[name] = rng.integers(0x08, 0x20, shape, np.uint8)
        else:
            count = int(np.prod(shape)) * dtype.itemsize
            arrays[name] = np.frombuffer(rng.bytes(count), dtype).reshape(shape)
    with on_host():
        some = np.asarray(dequantize({name: a[:2] for name, a in arrays.items()}, fmt))
    factor = k**-0.5 / float(some.std())
    for name, a in arrays.items():
        if a.dtype.kind == "f" or a.dtype.name == "bfloat16":
            arrays[name] = (a.astype(np.float32) * factor).astype(a.dtype)
    return arrays


def random_stack(fmt: Format, layers: int, n: int, k: int, *, tiled: bool = False, seed: int = 0) -> Arrays:
    """A stack of weights [layers, N, K] in rows, or in tiles for the native kernels.

    One is random; the others are its rows, or tiles, turned round: other bytes at every place, cheaply.
    """
    first = random_rows(fmt, n, k, np.random.default_rng(seed))
    if tiled:
        first = native.tile(first, fmt)
    stack = {}
    for name, array in first.items():
        stack[name] = np.empty((layers, *array.shape), array.dtype)
        for i in range(layers):
            stack[name][i] = np.roll(array, i, axis=0)
    return stack


def nbytes(arrays: Any) -> int:
    """Of all arrays of a weight."""
    return sum(a.nbytes for a in arrays.values())
