"""What the decoder sees of one layer's weights."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import row_ops
from realm_jax.model.adapters import RowAdapters
from realm_jax.model.params import Params
from realm_jax.model.partition import WHOLE, Partition
from realm_jax.quant import matmuls


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer: for each role a stack, and a (traced) index into it; and the rows' adapters, if any.

    On a mesh, what a device has of them: linear layers add up what the devices of a divided axis computed.
    """

    params: Params
    places: dict[str, tuple[str, jax.Array]]  # role -> (stack, index)
    backend: str
    number: jax.Array  # int32 scalar: of the layer in the model
    lora: RowAdapters | None = None
    partition: Partition = WHOLE

    def __contains__(self, role: str) -> bool:
        return role in self.places

    def vector(self, role: str) -> jax.Array:
        """float32, the shape of one layer's tensor."""
        stack, index = self.places[role]
        return self.params.vectors[stack][index]

    def norm(self, x: jax.Array, role: str, eps: float) -> jax.Array:
        """x [..., K] normalised by a weight of this layer, float32."""
        stack, index = self.places[role]
        return row_ops.rms_norm(x, self.params.vectors[stack], eps, layer=index, backend=row_backend(self.backend))

    def gated(self, gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
        """activation(gate) * up, float32."""
        return row_ops.gated(gate, up, activation, backend=row_backend(self.backend))

    def linear(self, x: jax.Array, name: str) -> jax.Array:
        """float32 [..., K] -> float32 [..., N], bias included where the layer has one."""
        stack, index = self.places[f"{name}.weight"]
        y = self.params.stacks[stack].matmul(x, layer=index, backend=self.backend)
        if self.lora is not None:
            [y] = self.lora.add(x, [f"{name}.weight"], [y], self.number, self.backend)
        axis = self.partition.reduced(name)
        if axis is not None:
            y = lax.psum(y, axis)
        return y + self.vector(f"{name}.bias") if f"{name}.bias" in self.places else y

    def linears(self, x: jax.Array, *names: str) -> list[jax.Array]:
        """`linear` of several layers' weights that share x, in one call where the kernels have one."""
        places = [self.places[f"{name}.weight"] for name in names]
        ys = matmuls(x, [self.params.stacks[stack] for stack, _ in places], [i for _, i in places], self.backend)
        if self.lora is not None:
            ys = self.lora.add(x, [f"{name}.weight" for name in names], ys, self.number, self.backend)
        return [y + self.vector(f"{n}.bias") if f"{n}.bias" in self.places else y for n, y in zip(names, ys)]

    def expert_linear(self, x: jax.Array, ids: jax.Array, name: str) -> jax.Array:
        """Row i of x [M, K] through expert ids[i] -> float32 [M, N], bias included where the layer has one.

        Where the K axis is divided these are partial sums, the bias in one of them, which the caller is to add up.
        """
        stack, index = self.places[f"{name}.weight"]
        y = self.params.stacks[stack].expert_matmul(x, ids, layer=index, backend=self.backend)
        if f"{name}.bias" not in self.places:
            return y
        bias, axis = self.vector(f"{name}.bias")[ids], self.partition.reduced(name)
        return y + (bias if axis is None else jnp.where(lax.axis_index(axis) == 0, bias, 0.0))


def row_backend(backend: str) -> str:
    """Of the small operations on rows, for a model's backend: XLA fuses them well, but on CPUs."""
    return "native" if backend == "native" else "xla"
