"""What one call of attention is: the options fixed at trace time, and which keys a query sees."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

KEY_BLOCK = 128  # positions; sums over keys run in blocks of this many, or of a divisor or multiple of it
NOTHING = -1e30  # a score no query sees: finite, so that differences of two are numbers
ABSENT = 1e30  # stands for the log-sum-exp of a query that sees nothing: every weight becomes exp(-1e30) = 0
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Options:
    """Fixed at trace time. window 0 and softcap 0.0 mean none; scale multiplies the scores before the soft-cap; ragged
    says that lengths are given."""

    causal: bool
    window: int
    scale: float
    softcap: float
    ragged: bool


def bounds_of(lengths: jax.Array | None, starts: jax.Array | None, batch: int, queries: int, keys: int) -> jax.Array:
    """int32 [B, 4]: position of the first query, number of keys, number of queries that are no padding, 0.

    lengths and starts as in ``flash_attention``. The fourth column makes a row 16 bytes.
    """
    start = jnp.zeros(batch, jnp.int32) if starts is None else starts.astype(jnp.int32)
    if lengths is None:
        count, rows = jnp.full(batch, keys, jnp.int32), jnp.full(batch, queries, jnp.int32)
    else:
        count = jnp.clip(lengths.astype(jnp.int32), 0, keys)
        rows = jnp.clip(count - start, 0, queries)
    return jnp.stack([start, count, rows, jnp.zeros_like(start)], axis=1)


def visible(position: Any, key: Any, options: Options) -> Any:
    """Whether a query at ``position`` sees the key at ``key`` (int32, broadcast), the sequence's end left aside."""
    distance = position - key
    seen = None
    if options.causal:
        seen = distance >= 0
    if options.window:
        near = distance < options.window
        seen = near if seen is None else seen & near
        if not options.causal:
            seen = seen & (distance > -options.window)
    return jnp.broadcast_to(True, jnp.shape(distance)) if seen is None else seen


def key_span(first: Any, last: Any, keys: Any, options: Options) -> tuple[Any, Any, Any, Any]:
    """Keys that queries at positions first..last may see, and those that all of them see.

    Returns (low, high, all_low, all_high), each a half-open range low..high within 0..keys; empty ranges may have
    high < low. All int32 scalars.
    """
    low: Any = 0
    all_low: Any = 0
    high, all_high = keys, keys
    if options.causal:
        high, all_high = jnp.minimum(high, last + 1), jnp.minimum(all_high, first + 1)
    elif options.window:
        high, all_high = jnp.minimum(high, last + options.window), jnp.minimum(all_high, first + options.window)
    if options.window:
        low, all_low = jnp.maximum(low, first - options.window + 1), jnp.maximum(all_low, last - options.window + 1)
    return low, high, all_low, all_high


def query_span(first: Any, last: Any, start: Any, queries: Any, options: Options) -> tuple[Any, Any, Any, Any]:
    """The reverse: query rows (0 is the one at position ``start``) that may see keys first..last, and those that see
    all of them; ranges within 0..queries, otherwise as ``key_span``."""
    low: Any = 0
    all_low: Any = 0
    high, all_high = queries, queries
    if options.causal:
        low, all_low = jnp.maximum(low, first - start), jnp.maximum(all_low, last - start)
    elif options.window:
        low = jnp.maximum(low, first - options.window + 1 - start)
        all_low = jnp.maximum(all_low, last - options.window + 1 - start)
    if options.window:
        high, all_high = (
            jnp.minimum(high, last + options.window - start),
            jnp.minimum(all_high, first + options.window - start),
        )
    return low, high, all_low, all_high


def block_span(span: tuple[Any, Any, Any, Any], size: int) -> tuple[Any, Any, Any, Any]:
    """The ranges of ``key_span`` or ``query_span`` in blocks of ``size``: low <= all_low <= all_high <= high.

    Blocks low..all_low and all_high..high hold pairs that do not see each other; those between do not.
    """
    low, high, all_low, all_high = (jnp.maximum(jnp.int32(0), edge) for edge in span)
    low, high = jax.lax.div(low, jnp.int32(size)), jax.lax.div(high + (size - 1), jnp.int32(size))
    high = jnp.maximum(low, high)
    inner_low = jnp.clip(jax.lax.div(all_low + (size - 1), jnp.int32(size)), low, high)
    inner_high = jnp.clip(jax.lax.div(all_high, jnp.int32(size)), inner_low, high)
    return low, inner_low, inner_high, high
