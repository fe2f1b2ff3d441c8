"""Low-rank adapters: reading them, keeping them on the device beside a model, merging them into it."""

from realm_jax.lora.adapter import Adapter, Pair, weight_shapes
from realm_jax.lora.merge import MergeReport, merge
from realm_jax.lora.reading import read_adapter
from realm_jax.lora.store import AdapterStore, Resident, check_scale

__all__ = [
    "Adapter",
    "AdapterStore",
    "MergeReport",
    "Pair",
    "Resident",
    "check_scale",
    "merge",
    "read_adapter",
    "weight_shapes",
]
