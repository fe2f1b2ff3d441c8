"""Every operation on the device against its reference in float32, on fresh random inputs: NMSE, and bits."""

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.grouped_lora import grouped_lora
from pallas_kernels.paged_attention import PAGE_SIZE, KVPages, paged_attention
from pallas_kernels.paged_attention import reference as paged_reference
from pallas_kernels.quant_matmul import FORMATS, dequantize, quant_matmul

from .random_weights import on_host, random_stack
from .report import Row

TOLERANCE = 1e-5  # NMSE, with bfloat16 or float16 on the way


def nmse(result: Any, expected: Any) -> float:
    """sum of squared differences over sum of squares, in float64; NaN where there is a NaN."""
    a, b = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    return float(((a - b) ** 2).sum() / (b**2).sum())


def all_checks(backend: str, tiny: bool) -> Iterator[Row]:
    """Rows of NMSE beside their tolerance; ok where it is kept. A case that fails is a row that says why."""
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    quantized = [name for name, fmt in FORMATS.items() if not fmt.dense]
    for name in ("Q4_K", "Q8_0") if tiny else quantized:
        yield _row(f"quant_matmul {name}", lambda: _matmul(name, backend, rng, tiny))  # noqa: B023 (called at once)
        yield _row(f"quant_matmul {name}: rows alone and together", lambda: _rows(name, backend, rng, tiny), 0.0)  # noqa: B023
    for dtype in ("float16",) if tiny else ("float16", "bfloat16", "float32", "int8"):
        for tokens in (1,) if tiny else (1, 100):
            what = f"paged_attention {dtype}, {tokens} tokens"
            yield _row(what, lambda: _paged(dtype, tokens, backend, rng))  # noqa: B023
    for head_dim in (64,) if tiny else (64, 128, 256):
        for backward in (False, True):
            what = f"flash_attention {'backward' if backward else 'forward'}, heads of {head_dim}"
            yield _row(what, lambda: _flash(head_dim, backward, backend, rng, tiny))  # noqa: B023
    yield _row("grouped_lora", lambda: _lora(backend, rng))


def _row(name: str, measure: Callable[[], float], tolerance: float = TOLERANCE) -> Row:
    try:
        error = measure()
    except Exception as problem:
        text = str(problem).strip().partition("\n")[0]
        return Row(name, None, "NMSE", limit=tolerance, problem=f"{type(problem).__name__}: {text}"[:300], ok=False)
    return Row(name, error, "NMSE", limit=tolerance, higher=False, ok=error <= tolerance)


def _weight(name: str, tiny: bool) -> tuple[Any, int, int]:
    n, k = (48, 256) if tiny else (1000, 2048)
    return jax.device_put(random_stack(FORMATS[name], 2, n, k, seed=secrets.randbits(32))), n, k


def _matmul(name: str, backend: str, rng: np.random.Generator, tiny: bool) -> float:
    """The worst of several row counts."""
    arrays, _, k = _weight(name, tiny)
    fmt = FORMATS[name]
    with on_host():
        dense = np.asarray(dequantize({key: np.asarray(a)[1] for key, a in arrays.items()}, fmt), np.float64)
    worst = 0.0
    for count in (1, 5) if tiny else (1, 3, 8, 16, 100):
        x = rng.standard_normal((count, k), np.float32)
        run = jax.jit(lambda x, arrays: quant_matmul(x, arrays, fmt, layer=1, backend=backend))
        worst = np.fmax(worst, nmse(run(x, arrays), x.astype(np.float64) @ dense.T))
    return float(worst)


def _rows(name: str, backend: str, rng: np.random.Generator, tiny: bool) -> float:
    """Which part of the bits' rows differ between calls of one row and of many: 0 is none."""
    arrays, _, k = _weight(name, tiny)
    run = jax.jit(lambda x, arrays: quant_matmul(x, arrays, FORMATS[name], layer=0, backend=backend))
    x = rng.standard_normal((3 if tiny else 32, k), np.float32)
    together = np.asarray(run(x, arrays))
    alone = np.concatenate([np.asarray(run(x[i : i + 1], arrays)) for i in range(len(x))])
    return float((together.view(np.int32) != alone.view(np.int32)).any(1).mean())


def _paged(dtype: str, tokens: int, backend: str, rng: np.random.Generator) -> float:
    batch, heads, kv, d, context = 2, 8, 2, 64, 300
    pages = 6
    shape = (2, batch * pages, kv, PAGE_SIZE, d)
    if dtype == "int8":
        rows = [jnp.asarray(rng.integers(-127, 128, shape, np.int8)) for _ in range(2)]
        scales = [jnp.asarray(rng.random(shape[:-1], np.float32) / 64) for _ in range(2)]
        pool = KVPages(*rows, *scales)
    else:
        pool = KVPages(*(jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype) for _ in range(2)))
    tables = jnp.asarray(rng.permutation(batch * pages).reshape(batch, pages), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(context - tokens, context, dtype=jnp.int32), (batch, tokens))
    q = jnp.asarray(rng.standard_normal((batch, tokens, heads, d), np.float32))
    options: dict[str, Any] = {"layer": 1, "scale": d**-0.5, "window": 0, "value_dim": d}
    expected = paged_reference.paged_attention(q, pool, tables, positions, **options)
    run = jax.jit(lambda *a: paged_attention(*a, **options, blocks=3, backend=backend))
    return nmse(run(q, pool, tables, positions), expected)


def _flash(head_dim: int, backward: bool, backend: str, rng: np.random.Generator, tiny: bool) -> float:
    tokens, heads, kv = (70, 2, 1) if tiny else (700, 8, 2)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((2, tokens, h, head_dim), np.float32)).astype(jnp.bfloat16)
        for h in (heads, kv, kv, heads)
    )
    lengths = jnp.asarray([tokens, tokens - 13], jnp.int32)

    def run(backend: str, *arrays: jax.Array) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return flash_attention(q, k, v, lengths=lengths, backend=backend)

        if not backward:
            return jax.jit(attend)(*arrays[:3])
        return jax.jit(lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g))(*arrays)

    mine = run(backend, q, k, v, g)
    with jax.default_matmul_precision("highest"):
        expected = run("reference", *(a.astype(jnp.float32) for a in (q, k, v, g)))
    pairs = zip(jax.tree.leaves(mine), jax.tree.leaves(expected))
    return max((nmse(a.astype(jnp.float32), b) for a, b in pairs), key=lambda e: (e != e, e))


def _lora(backend: str, rng: np.random.Generator) -> float:
    count, slots, rank, n, k = 7, 4, 16, 192, 256
    x, base = (rng.standard_normal(s, np.float32) for s in ((count, k), (count, n)))
    a, b = (
        jnp.asarray(rng.standard_normal(s, np.float32)).astype(jnp.float16)
        for s in ((slots, rank, k), (slots, n, rank))
    )
    chosen = jnp.asarray([0, 3, -1, 3, 1, 2, -1], jnp.int32)
    scales = np.asarray([1.0, 0.5, 2.0, -1.0], np.float32)
    run = jax.jit(lambda base, *rest: grouped_lora(*rest, base=base, backend=backend))
    result = run(base, x, chosen, a, b, scales)
    expected = base.astype(np.float64)
    for i, slot in enumerate(np.asarray(chosen)):
        if slot >= 0:
            part = np.asarray(b[slot], np.float64) @ (np.asarray(a[slot], np.float64) @ x[i])
            expected[i] += scales[slot] * part
    return nmse(result, expected)
