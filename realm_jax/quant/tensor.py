"""A weight as the model holds it: packed arrays with their format."""

from typing import Any

import flax.struct
import jax
import numpy as np

from pallas_kernels.quant_matmul import (
    FORMATS,
    UnsupportedError,
    dequantize,
    expert_matmul,
    quant_matmul,
    take_rows,
)
from realm_jax.errors import BackendError


@flax.struct.dataclass
class QuantizedTensor:
    """A weight of logical shape [..., N, K], or a vector [..., K], packed in ``format``.

    arrays: as pallas_kernels.quant_matmul.formats describes. format: ggml's type name, static.
    """

    arrays: dict[str, Any]
    format: str = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, outermost first."""
        first = next(iter(self.arrays.values()))
        return (*first.shape[:-1], FORMATS[self.format].columns(self.arrays))

    @property
    def nbytes(self) -> int:
        """Bytes of all packed arrays."""
        return sum(a.size * np.dtype(a.dtype).itemsize for a in self.arrays.values())

    def matmul(self, x: jax.Array, layer: jax.Array | int | None = None, backend: str = "auto") -> jax.Array:
        """x [..., K] -> float32 [..., N]; ``layer`` picks one of a stack [L, N, K]. BackendError if not available."""
        try:
            return quant_matmul(x, self.arrays, FORMATS[self.format], layer=layer, backend=backend)
        except UnsupportedError as e:
            raise BackendError(str(e)) from e

    def expert_matmul(
        self, x: jax.Array, expert_ids: jax.Array, layer: jax.Array | int | None = None, backend: str = "auto"
    ) -> jax.Array:
        """Row i of x [..., K] times expert expert_ids[i] of [E, N, K], or of a layer of [L, E, N, K] -> [..., N]."""
        try:
            return expert_matmul(x, expert_ids, self.arrays, FORMATS[self.format], layer=layer, backend=backend)
        except UnsupportedError as e:
            raise BackendError(str(e)) from e

    def take_rows(self, ids: jax.Array) -> jax.Array:
        """Rows ``ids`` [...] int32 of [N, K] -> float32 [..., K], dequantizing only those."""
        return take_rows(self.arrays, FORMATS[self.format], ids)

    def dequantize(self) -> jax.Array:
        """The whole weight as float32 [..., N, K]: for small tensors (norms, biases) and tests."""
        return dequantize(self.arrays, FORMATS[self.format])
