"""A weight as the model holds it: packed arrays with their format."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from pallas_kernels.quant_matmul import (
    FORMATS,
    UnsupportedError,
    Weight,
    dequantize,
    expert_matmul,
    quant_matmul,
    quant_matmuls,
    take_rows,
)
from realm_jax.errors import BackendError


@flax.struct.dataclass
class QuantizedTensor:
    """A weight of logical shape [..., N, K], or a vector [..., K], packed in ``format``.

    arrays: rows or tiles, as pallas_kernels.quant_matmul describes. format: ggml's type name, static. rows: N of a
    tiled weight, static; None otherwise. Weights of plain floats are multiplied by XLA's own dot, whatever the backend.
    """

    arrays: dict[str, Any]
    format: str = flax.struct.field(pytree_node=False)
    rows: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def weight(self) -> Weight:
        """As the kernels take it."""
        return Weight(self.arrays, FORMATS[self.format], self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, outermost first."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all packed arrays."""
        return sum(a.size * np.dtype(a.dtype).itemsize for a in self.arrays.values())

    def matmul(self, x: jax.Array, layer: jax.Array | int | None = None, backend: str = "auto") -> jax.Array:
        """x [..., K] -> float32 [..., N]; ``layer`` picks one of a stack [L, N, K]. BackendError if not available."""
        try:
            return quant_matmul(x, *self.weight[:2], n=self.rows, layer=layer, backend=self._backend(backend))
        except UnsupportedError as e:
            raise BackendError(str(e)) from e

    def expert_matmul(
        self, x: jax.Array, expert_ids: jax.Array, layer: jax.Array | int | None = None, backend: str = "auto"
    ) -> jax.Array:
        """Row i of x [..., K] times expert expert_ids[i] of [E, N, K], or of a layer of [L, E, N, K] -> [..., N]."""
        try:
            return expert_matmul(
                x, expert_ids, *self.weight[:2], n=self.rows, layer=layer, backend=self._backend(backend)
            )
        except UnsupportedError as e:
            raise BackendError(str(e)) from e

    def take_rows(self, ids: jax.Array) -> jax.Array:
        """Rows ``ids`` [...] int32 of [N, K] -> float32 [..., K], dequantizing only those."""
        return take_rows(self.arrays, FORMATS[self.format], ids, self.rows)

    def dequantize(self) -> jax.Array:
        """The whole weight, in rows, as float32 [..., N, K]: for small tensors (norms, biases) and tests."""
        return dequantize(self.arrays, FORMATS[self.format])

    def _backend(self, backend: str) -> str:
        return "auto" if FORMATS[self.format].dense else backend


def matmuls(
    x: jax.Array, tensors: Sequence[QuantizedTensor], layers: Sequence[Any], backend: str = "auto"
) -> list[jax.Array]:
    """x [..., K] times a layer of each of several stacks -> float32 [..., N] each, in one call where there is one."""
    if any(FORMATS[t.format].dense for t in tensors):
        return [t.matmul(x, layer, backend) for t, layer in zip(tensors, layers)]
    try:
        return quant_matmuls(x, [t.weight for t in tensors], layers=layers, backend=backend)
    except UnsupportedError as e:
        raise BackendError(str(e)) from e
