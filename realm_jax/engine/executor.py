"""What owns the devices' state of one model: the page pool and the compiled programs. It runs batches, as they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from realm_jax.cache import KVPages, allocate_pages, row_dtype
from realm_jax.engine.programs import Wanted, batch_program, on_mesh, pool_spec
from realm_jax.errors import CapacityError
from realm_jax.model.adapters import RowAdapters, Stack
from realm_jax.model.params import Model
from realm_jax.sharding.devices import assemble, divide, first_copy
from realm_jax.sharding.mesh import MESH_AXES


class Batch(NamedTuple):
    """Inputs of a program, padded, on the host. B rows of T tokens; on a mesh those of each region one after another.

    tokens, positions: int32 [B, T]. tables: int32 [B, pages], pages counted within the region. last: int32 [N], the
    tokens whose logits are wanted, counted within the region's B / regions * T. blocks: int32 scalar. source: int32
    [B], where in last_tokens a row's token is, -1 for the one given. slots: int32 [B] of adapters; None: without.
    """

    tokens: np.ndarray
    positions: np.ndarray
    tables: np.ndarray
    last: np.ndarray
    blocks: np.ndarray
    source: np.ndarray
    slots: np.ndarray | None = None


class Executor:
    """Runs batches on one device or a mesh. In a job of several processes each has one, and all run the same batches.

    Attributes:
      pool: None until the first batch, and after a call that failed: what was cached is lost then.
    """

    def __init__(self, model: Model, *, max_batch: int, num_pages: int, meet: Callable[[], None] | None = None):
        """max_batch: slots of last_tokens. num_pages: of the pool, over all devices. meet: waits for a job's other
        processes, after compiling: a collective gives up on those that come much later."""
        self.model = model
        self.pool: KVPages | None = None
        self.on_compile: Callable[[str], None] | None = None
        self._max_batch = max_batch
        self._num_pages = num_pages
        self._meet = meet
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._zero_tokens: jax.Array | None = None

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def swap(self, model: Model) -> None:
        """Runs another model of the same config from now on; nothing of the old one's cache may be used."""
        self.model = model
        self._programs.clear()

    def run(
        self, wanted: Wanted, batch: Batch, last_tokens: jax.Array | None, stacks: dict[str, Stack] | None
    ) -> jax.Array:
        """The result of run_batch, still being computed perhaps.

        last_tokens: int32 [max_batch + 1], on the mesh's first device; None: all zero, as in every process but the
        first. stacks: adapters, for a batch with slots.
        """
        with _naming_lack_of_memory():
            args = self._arguments(batch, last_tokens, stacks)
            program = self._program(wanted, args)
            self.pool = None  # donated
            out, self.pool = program(*args)
        return out if self.model.mesh is None else first_copy(out)

    def compile(self, wanted: Wanted, batch: Batch, stacks: dict[str, Stack] | None) -> None:
        """Compiles the program of such a batch."""
        with _naming_lack_of_memory():
            self._program(wanted, self._arguments(batch, None, stacks))

    def _arguments(self, batch: Batch, last_tokens: jax.Array | None, stacks: dict[str, Stack] | None) -> tuple:
        if self.pool is None:
            self.pool = self._allocate()
        if self.model.mesh is not None:
            mesh = self.model.mesh
            batch = jax.tree.map(lambda a: divide(a, mesh, "data") if a.ndim else a, batch)
        lora = None
        if stacks is not None and batch.slots is not None:
            lora = RowAdapters(stacks, batch.slots)  # type: ignore[arg-type]  # numpy will do
        return (self.model.params, self.pool, *batch[:6], self._last_tokens(last_tokens), lora)

    def _last_tokens(self, drawn: jax.Array | None) -> Any:
        """As run_batch takes them: on a mesh a row for each device, all but the first's zero."""
        nothing = np.zeros((1, self._max_batch + 1), np.int32)
        if self.model.mesh is None:
            return nothing[0] if drawn is None else drawn
        if self._zero_tokens is None:
            self._zero_tokens = assemble(lambda _: nothing, self.model.mesh, (MESH_AXES, None))
        zeros = self._zero_tokens
        if drawn is None:
            return zeros
        rows = [drawn[None], *(shard.data for shard in zeros.addressable_shards[1:])]
        return jax.make_array_from_single_device_arrays(zeros.shape, zeros.sharding, rows)

    def _allocate(self) -> KVPages:
        c, dtype = self.model.config, row_dtype(self.model.backend)
        shape = (c.num_layers, self._num_pages, c.num_kv_heads, c.head_dim, c.value_dim)
        if self.model.mesh is None:
            return allocate_pages(*shape, dtype)
        place = on_mesh(pool_spec(self.model.partition), self.model.mesh)
        return jax.jit(lambda: allocate_pages(*shape, dtype), out_shardings=place)()

    def _program(self, wanted: Wanted, args: tuple) -> Callable[..., Any]:
        rows, size = args[2].shape
        lora = args[-1]
        shapes = () if lora is None else tuple((r, *(a.shape for a in s)) for r, s in sorted(lora.stacks.items()))
        key = (wanted, rows, size, shapes)
        if key not in self._programs:
            if self.on_compile is not None:
                self.on_compile(f"{rows} x {size} tokens" + (" with adapters" if shapes else ""))
            self._programs[key] = batch_program(self.model, wanted, lora).lower(*args).compile()
            if self._meet is not None:
                self._meet()
        return self._programs[key]


def as_message(batch: Batch) -> list[Any]:
    """A batch as `run` and `compile` take it."""
    return [None if array is None else np.asarray(array) for array in batch]


@contextmanager
def _naming_lack_of_memory() -> Iterator[None]:
    """Tells what a device's "resource exhausted" means to a user."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).partition("\n")[0]
        raise CapacityError(f"out of memory ({first}): a smaller context_length or max_batch needs less") from error
