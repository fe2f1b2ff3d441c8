"""The native backend, on CPUs: rows grouped by slot, both products in one call for all linears (native/lora.cc).

Sums have an order that K and R fix (native/lora_isa.cc), so a row's bits depend on nothing else. Adapters that no row
uses are not read; when no row has one the call returns at once, with the bases as its results.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import available, isa, register, why_not

from .case import Adapters, Case


def unsupported(case: Case) -> str | None:
    """Why this backend does not take the case; None when it does."""
    return None if available() else why_not()


def add_deltas(
    x: jax.Array,
    slots: jax.Array,
    bases: tuple[jax.Array, ...],
    adapters: tuple[Adapters, ...],
    layer: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """As xla.add_deltas."""
    outs = tuple(jax.ShapeDtypeStruct(base.shape, jnp.float32) for base in bases)
    operands: list[Any] = [x, slots, layer]
    aliases = {}  # each base's buffer becomes its result's
    for i, (base, one) in enumerate(zip(bases, adapters, strict=True)):
        aliases[len(operands)] = i
        operands += [base, one.a, one.b, one.scales]
    call = jax.ffi.ffi_call(
        register("realm_grouped_lora"), outs, input_output_aliases=aliases, vmap_method="sequential"
    )
    return tuple(call(*operands, isa=np.int64(isa())))
