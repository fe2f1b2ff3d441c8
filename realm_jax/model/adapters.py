"""Low-rank adapters beside a model's weights, as the decoder sees them: a pytree, and what it adds to a result."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels.grouped_lora import UnsupportedError, grouped_lora_many
from realm_jax.errors import BackendError
from realm_jax.model.partition import Partition

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"

# Of one role: a [L, S, R, K], b [L, S, N, R], scales float32 [S], S slots. L is all layers of the model, or
# 1 for what a model has once. The embedding's a is [1, S, vocab, R]: its rows are looked up.
Stack = tuple[jax.Array, jax.Array, jax.Array]


def stack_axes(role: str, partition: Partition) -> tuple[tuple[str | None, ...], ...]:
    """The mesh axis of each axis of a Stack's arrays: divided as the matrix is that they adapt, or whole."""
    rows, columns = (None, None) if role == EMBEDDING else partition.axes(role)
    return (None, None, None, columns), (None, None, rows, None), (None,)


@flax.struct.dataclass
class RowAdapters:
    """Adapters of all slots, and which slot each row uses.

    stacks: by role ("attn_q.weight"); shared by all rows, not batched under vmap. Roles without adapters are absent.
    slot: int32, a scalar for one sequence, or with leading axes of the rows; -1 for no adapter.
    """

    stacks: dict[str, Stack]
    slot: jax.Array

    def add(
        self, x: jax.Array, roles: Sequence[str], bases: Sequence[jax.Array], layer: jax.Array | int, backend: str
    ) -> list[jax.Array]:
        """Results of linear layers that share x, with each row's adapter added where a role has adapters.

        Args:
            x: float32 [..., K].
            roles: of the linear layers.
            bases: float32 [..., N], one for each.
            layer: its number in the model; 0 for what a model has once.
            backend: of the kernels.

        Raises:
            BackendError: the backend does not take the case.
        """
        held = [i for i, role in enumerate(roles) if role in self.stacks]
        out = list(bases)
        if not held:
            return out
        try:
            sums = grouped_lora_many(
                x,
                self.rows(x.shape[:-1]),
                [self.stacks[roles[i]] for i in held],
                layer=layer,
                bases=[bases[i] for i in held],
                backend=backend,
            )
        except UnsupportedError as e:
            raise BackendError(str(e)) from e
        for i, total in zip(held, sums, strict=True):
            out[i] = total
        return out

    def add_embedding(self, embedded: jax.Array, tokens: jax.Array, backend: str) -> jax.Array:
        """Embeddings float32 [T, hidden] of tokens int32 [T], with the adapters' own."""
        if EMBEDDING not in self.stacks:
            return embedded
        a, b, scales = self.stacks[EMBEDDING]
        slots, rank = self.rows(tokens.shape), a.shape[-1]
        rows = a[0, jnp.maximum(slots, 0), tokens].astype(jnp.float32)  # [T, R]
        # A is the identity now: the kernel then keeps a row's bits apart from the batch's, as a dot would not.
        identity = jnp.broadcast_to(jnp.eye(rank, dtype=a.dtype), (1, a.shape[1], rank, rank))
        inner = RowAdapters({EMBEDDING: (identity, b, scales)}, self.slot)
        return inner.add(rows, [EMBEDDING], [embedded], 0, backend)[0]

    def rows(self, lead: tuple[int, ...]) -> jax.Array:
        """The slots of rows with these leading axes, of which slot has the first few."""
        slot = self.slot.reshape(self.slot.shape + (1,) * (len(lead) - self.slot.ndim))
        return jnp.broadcast_to(slot, lead)
