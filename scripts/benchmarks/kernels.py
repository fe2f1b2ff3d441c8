"""Each kernel against what the hardware allows and against XLA, or the vendor's library, on the same arrays.

A memory-bound kernel cycles, inside one jit, through more memory than the last-level cache holds. Times are medians of
whole calls. Limits are of the measured peaks: bytes read once over bandwidth, or operations over the arithmetic rate,
whichever takes longer.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.grouped_lora import grouped_lora
from pallas_kernels.paged_attention import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, KVPages, paged_attention
from pallas_kernels.quant_matmul import FORMATS, Format, quant_matmul

from .machine import Peaks, median
from .random_weights import nbytes, random_stack
from .report import Row

MOST_LAYERS = 256


@dataclass(frozen=True)
class Sizes:
    """What is timed. backend, flash: ours. peer: "xla", or "library" for cuBLAS and cuDNN in bfloat16.

    matrix: (N, K). cycle_bytes: read before anything is read again. seconds: spent on one figure. passes: through the
    cycle in one call; unroll: of the loop, so that a GPU gets several launches at once.
    """

    backend: str
    flash: str
    peer: str
    tiled: bool
    matrix: tuple[int, int]
    cycle_bytes: int
    seconds: float
    passes: int = 1
    unroll: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (128, 1024, 4096)
    chunk: int = 128
    attention_tokens: int = 1024
    attention_dtype: Any = jnp.float32
    rank: int = 16
    adapters: int = 8


def cpu_sizes(cache_bytes: int, quick: bool, tiled: bool) -> Sizes:
    """For the native kernels, or XLA's where they were not built."""
    ours = "native" if tiled else "xla"
    cycle = (64 << 20) if quick else min(max(4 * cache_bytes, 256 << 20), 1 << 30)
    return Sizes(ours, "xla", "xla", tiled, (8192, 2048), cycle, 0.1 if quick else 0.4)


def gpu_sizes(quick: bool) -> Sizes:
    return Sizes(
        *("gpu", "gpu", "library", False, (14336, 4096), 1100 << 20, 0.1 if quick else 0.3),
        passes=4,
        unroll=4,
        head_dim=128,
        batches=(1, 16),
        attention_tokens=4096,
        attention_dtype=jnp.bfloat16,
    )


def dry_sizes() -> Sizes:
    """The GPU's code paths on any machine: kernels interpreted, everything tiny."""
    return Sizes(
        *("interpret", "interpret", "library", False, (64, 256), 1, 0.0),
        unroll=2,
        heads=4,
        kv_heads=2,
        head_dim=64,
        batches=(2,),
        contexts=(128,),
        chunk=16,
        attention_tokens=64,
        attention_dtype=jnp.bfloat16,
        rank=16,
        adapters=2,
    )


def tiny(sizes: Sizes) -> Sizes:
    """The same paths at sizes that take no time."""
    return replace(dry_sizes(), backend=sizes.backend, flash=sizes.flash, peer=sizes.peer, tiled=sizes.tiled)


def timed(run: Callable[..., Any], *args: Any, seconds: float, inner: int = 1) -> list[float]:
    """Seconds of each call after one that compiles; at least three, or one where seconds is 0.

    inner: calls in a row before waiting for the last, which hides the gaps between launches.
    """
    jax.block_until_ready(run(*args))
    samples: list[float] = []
    until = time.perf_counter() + seconds
    while len(samples) < (3 if seconds else 1) or (time.perf_counter() < until and len(samples) < 200):
        begun = time.perf_counter()
        for _ in range(inner):
            out = run(*args)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - begun) / inner)
    return samples


def cycling(operation: Callable[..., jax.Array], layers: int, sizes: Sizes) -> Callable[..., jax.Array]:
    """A compiled loop of operation(*args, layer) over all layers, `passes` times."""

    def body(total: jax.Array, layer: jax.Array, args: tuple[Any, ...]) -> jax.Array:
        # The barrier keeps XLA from computing only the part that is added up.
        out = lax.optimization_barrier(operation(*args, layer))
        return total + out.reshape(-1)[:16].astype(jnp.float32)

    def loop(*args: Any) -> jax.Array:
        numbers = jnp.tile(jnp.arange(layers, dtype=jnp.int32), sizes.passes)
        zero = jnp.zeros(16, jnp.float32)
        return lax.scan(lambda t, i: (body(t, i, args), None), zero, numbers, unroll=sizes.unroll)[0]

    return jax.jit(loop)


def per_layer(operation: Callable[..., jax.Array], args: tuple[Any, ...], layers: int, sizes: Sizes) -> list[float]:
    """Seconds of one operation, cycling through all layers."""
    samples = timed(cycling(operation, layers, sizes), *args, seconds=sizes.seconds)
    return [s / (layers * sizes.passes) for s in samples]


def layers_for(bytes: int, sizes: Sizes) -> int:
    return max(2, min(MOST_LAYERS, -(-sizes.cycle_bytes // bytes)))


def row(name: str, mine: list[float], theirs: list[float] | None, limit: float | None, rate: str, peer: str) -> Row:
    """A row in microseconds."""
    peers = [s * 1e6 for s in theirs or []]
    figures = [s * 1e6 for s in mine]
    return Row(
        name,
        median(figures),
        "us",
        limit=None if limit is None else limit * 1e6,
        peer=median(peers) if peers else None,
        peer_name=peer if peers else "",
        higher=False,
        rate=rate,
        samples=figures,
        peer_samples=peers,
    )


def refused(name: str, error: Exception) -> Row:
    """A figure there is none of, and why."""
    text = str(error).strip().partition("\n")[0]
    return Row(name, None, "us", problem=f"{type(error).__name__}: {text}"[:300])


def guarded(name: str, make: Callable[[], Row]) -> Row:
    """A failure of one case is a row of its own, and the next case goes on."""
    try:
        return make()
    except Exception as error:
        return refused(name, error)


def matmul_rows(formats: list[str], counts: tuple[int, ...], sizes: Sizes, peaks: Peaks) -> Iterator[Row]:
    """quant_matmul of every format with so many rows of x."""
    n, k = sizes.matrix
    x_of = np.random.default_rng(1)
    for name in formats:
        fmt = FORMATS[name]
        one = random_stack(fmt, 1, n, k, tiled=sizes.tiled)
        layers = layers_for(nbytes(one), sizes)
        stacked = jax.device_put(random_stack(fmt, layers, n, k, tiled=sizes.tiled))
        for count in counts:
            x = jnp.asarray(x_of.standard_normal((count, k)), jnp.float32)
            yield guarded(
                f"quant_matmul {name}, {count} x {n} x {k}",
                lambda: _matmul_row(fmt, x, stacked, layers, nbytes(one), sizes, peaks),  # noqa: B023 (called at once)
            )


def _matmul_row(fmt: Format, x: jax.Array, stacked: Any, layers: int, bytes: int, sizes: Sizes, peaks: Peaks) -> Row:
    n, k = sizes.matrix
    count = x.shape[0]
    rows = n if sizes.tiled else None
    few = layers if count <= 16 else min(layers, 4)

    def operation(x: jax.Array, arrays: Any, layer: jax.Array) -> jax.Array:
        return quant_matmul(x, arrays, fmt, n=rows, layer=layer, backend=sizes.backend)

    mine = per_layer(operation, (x, stacked), few, sizes)
    theirs, peer = _matmul_peer(fmt, x, sizes)
    moved = bytes + 4 * count * (n + k)
    limit = peaks.seconds(moved, int8=2.0 * count * n * k)
    seconds = median(mine)
    rate = f"{bytes / seconds * 1e-9:.4g} GB/s, {2 * count * n * k / seconds * 1e-9:.4g} GOP/s"
    return row(f"quant_matmul {fmt.name}, {count} x {n} x {k}", mine, theirs, limit, rate, peer)


def _matmul_peer(fmt: Format, x: jax.Array, sizes: Sizes) -> tuple[list[float] | None, str]:
    """The same product by XLA from packed rows, or from bfloat16 weights by XLA's dot, which is cuBLAS on a GPU."""
    n, k = sizes.matrix
    if sizes.peer == "library":
        name = "cuBLAS bf16" if jax.default_backend() == "gpu" else "XLA bf16"
        return _dense_seconds(x.shape[0], sizes), name
    if sizes.backend == "xla":
        return None, ""
    packed = jax.device_put(random_stack(fmt, 2, n, k))  # this path is nowhere near the memory's speed

    def unpacked(x: jax.Array, arrays: Any, layer: jax.Array) -> jax.Array:
        return quant_matmul(x, arrays, fmt, layer=layer, backend="xla")

    return per_layer(unpacked, (x, packed), 2, sizes), "XLA"


@cache
def _dense_seconds(count: int, sizes: Sizes) -> list[float]:
    """XLA's product of so many rows with bfloat16 weights, the same for every packed format."""
    n, k = sizes.matrix
    layers = layers_for(2 * n * k, sizes) if count <= 16 else 4
    x_key, weight_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (count, k), jnp.bfloat16)
    weights = jax.random.normal(weight_key, (layers, n, k), jnp.bfloat16)

    def dense(x: jax.Array, weights: jax.Array, layer: jax.Array) -> jax.Array:
        return jnp.dot(x, weights[layer].T, preferred_element_type=jnp.float32)

    return per_layer(dense, (x, weights), layers, sizes)


def paged_rows(sizes: Sizes, peaks: Peaks) -> Iterator[Row]:
    """paged_attention: decoding at each context and batch, and one chunk of a prompt at the end of each context."""
    cases = [(batch, 1, context) for batch in sizes.batches for context in sizes.contexts]
    cases += [(1, sizes.chunk, context) for context in sizes.contexts[-2:]]
    for batch, tokens, context in cases:
        name = f"paged_attention {batch} x {tokens} tokens at {context}"
        yield guarded(name, lambda: _paged_row(name, batch, tokens, context, sizes, peaks))  # noqa: B023


def _paged_row(name: str, batch: int, tokens: int, context: int, sizes: Sizes, peaks: Peaks) -> Row:
    dtype, d, kv = jnp.float16, sizes.head_dim, sizes.kv_heads
    read = 2 * batch * context * kv * d * 2
    layers = layers_for(read, sizes) if tokens == 1 else 4
    pages = -(-context // BLOCK_SIZE) * BLOCK_PAGES
    shape = (batch * pages, kv, PAGE_SIZE, d)
    rng = np.random.default_rng(0)
    first = (rng.integers(-100, 101, shape, np.int8) / np.float32(64)).astype(np.float16)
    turned = np.stack([np.roll(first, i, axis=0) for i in range(min(layers, 8))])
    rows = jnp.asarray(turned)[jnp.arange(layers) % len(turned)].astype(dtype)
    pool = KVPages(rows, rows[:, ::-1] + 0)
    tables = jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)
    positions = jnp.broadcast_to(jnp.arange(context - tokens, context, dtype=jnp.int32), (batch, tokens))
    q = jnp.asarray(rng.standard_normal((batch, tokens, sizes.heads, d)), jnp.float32)

    def seconds(backend: str, layers: int) -> list[float]:
        def operation(q: jax.Array, pool: Any, tables: jax.Array, positions: jax.Array, layer: jax.Array) -> jax.Array:
            blocks = jnp.int32(-(-context // BLOCK_SIZE))
            return paged_attention(
                *(q, pool, tables, positions),
                layer=layer,
                blocks=blocks,
                scale=d**-0.5,
                value_dim=d,
                backend=backend,
            )

        return per_layer(operation, (q, pool, tables, positions), layers, sizes)

    mine = seconds(sizes.backend, layers)
    theirs = None if sizes.backend == "xla" else seconds("xla", layers)
    pairs = batch * tokens * (context - (tokens - 1) / 2)
    work = 4.0 * pairs * sizes.heads * d
    rate = f"{read / median(mine) * 1e-9:.4g} GB/s, {work / median(mine) * 1e-9:.4g} GFLOP/s"
    return row(name, mine, theirs, peaks.seconds(read, float32=work), rate, "XLA")


def flash_rows(sizes: Sizes, peaks: Peaks) -> Iterator[Row]:
    """flash_attention, causal: forward, and backward alone."""
    for backward in (False, True):
        name = f"flash_attention {'backward' if backward else 'forward'}, {sizes.attention_tokens} tokens causal"
        yield guarded(name, lambda: _flash_row(name, backward, sizes, peaks))  # noqa: B023


def _flash_row(name: str, backward: bool, sizes: Sizes, peaks: Peaks) -> Row:
    tokens, d = sizes.attention_tokens, sizes.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
    q, k, v, g = (
        jax.random.normal(key, (1, tokens, h, d), jnp.float32).astype(sizes.attention_dtype)
        for key, h in zip(keys, heads)
    )
    library: Any = "cudnn" if sizes.peer == "library" and jax.default_backend() == "gpu" else None

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return flash_attention(q, k, v, backend=sizes.flash)

    def other(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=library)

    inner = 8 if sizes.passes > 1 else 1

    def seconds(attend: Callable[..., jax.Array]) -> list[float]:
        if not backward:
            return timed(jax.jit(attend), q, k, v, seconds=sizes.seconds, inner=inner)
        _, pull = jax.jit(lambda *a: jax.vjp(attend, *a))(q, k, v)
        return timed(jax.jit(lambda pull, g: pull(g)), pull, g, seconds=sizes.seconds, inner=inner)

    work = 2.0 * tokens * tokens * sizes.heads * d * (2.5 if backward else 1.0)  # half of all pairs
    mine, theirs = seconds(ours), seconds(other)
    rate = f"{work / median(mine) * 1e-9:.4g} GFLOP/s"
    size = jnp.dtype(sizes.attention_dtype).itemsize * tokens * d * (2 * sizes.heads + 2 * sizes.kv_heads)
    peer = "cuDNN" if library else "XLA, all pairs"
    return row(name, mine, theirs, peaks.seconds(size, float32=work), rate, peer)


def lora_rows(sizes: Sizes, peaks: Peaks) -> Iterator[Row]:
    """grouped_lora of one linear: a row for each adapter, and rows with none."""
    for used in (True, False):
        name = f"grouped_lora, {sizes.adapters} rows {'of as many adapters' if used else 'without any'}"
        yield guarded(name, lambda: _lora_row(name, used, sizes, peaks))  # noqa: B023


def _lora_row(name: str, used: bool, sizes: Sizes, peaks: Peaks) -> Row:
    n, k = sizes.matrix
    count, rank = sizes.adapters, sizes.rank
    bytes = 2 * count * rank * (n + k)
    layers = layers_for(bytes, sizes)
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(rng.integers(-8, 9, shape, np.int8)).astype(jnp.float16) / 64
        for shape in ((layers, count, rank, k), (layers, count, n, rank))
    )
    x = jnp.asarray(rng.standard_normal((count, k)), jnp.float32)
    slots = jnp.arange(count, dtype=jnp.int32) if used else jnp.full(count, -1, jnp.int32)
    base = jnp.asarray(rng.standard_normal((count, n)), jnp.float32)
    scales = jnp.ones(count, jnp.float32)

    def seconds(backend: str, layers: int) -> list[float]:
        def operation(*args: Any) -> jax.Array:
            x, slots, a, b, scales, base, layer = args
            return grouped_lora(x, slots, a, b, scales, layer=layer, base=base, backend=backend)

        return per_layer(operation, (x, slots, a, b, scales, base), layers, sizes)

    mine = seconds(sizes.backend, layers)
    theirs = None if sizes.backend == "xla" else seconds("xla", layers)
    limit = peaks.seconds(bytes) if used else None
    rate = f"{bytes / median(mine) * 1e-9:.4g} GB/s" if used else ""
    return row(name, mine, theirs, limit, rate, "XLA")
