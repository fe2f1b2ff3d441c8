"""What a call is about: the operands of the operation and their static description, by which backends say yes or no."""

from typing import Any, NamedTuple

import jax

DTYPES = ("float32", "bfloat16", "float16")  # of adapters


class Adapters(NamedTuple):
    """The adapters of one linear layer of K inputs and N outputs, by slot, stacked over L layers of the model.

    a: float32, bfloat16 or float16 [L, S, R, K]. b: [L, S, N, R]. scales: float32 [S].
    """

    a: jax.Array
    b: jax.Array
    scales: jax.Array


class Linear(NamedTuple):
    """Static description of one Adapters."""

    rank: int
    outputs: int
    a_dtype: str
    b_dtype: str


class Case(NamedTuple):
    """Static description of a call: rows of x, their columns, the slots there are, the linears that share x."""

    rows: int
    columns: int
    slots: int
    linears: tuple[Linear, ...]


def case_of(rows: int, adapters: tuple[Adapters, ...]) -> Case:
    """The Case of a call on ``rows`` rows."""
    _, slots, _, columns = adapters[0].a.shape
    return Case(rows, columns, slots, tuple(_linear(one) for one in adapters))


def _linear(one: Any) -> Linear:
    return Linear(one.a.shape[2], one.b.shape[2], one.a.dtype.name, one.b.dtype.name)
