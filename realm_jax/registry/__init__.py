"""Model registry: where model files come from and where they are kept. Needs no JAX."""

from realm_jax.registry.resolve import ModelStatus, find, listing, remove, resolve
from realm_jax.registry.store import Progress, cache_root
from realm_jax.registry.table import ModelEntry, default_name, entries

__all__ = [
    "ModelEntry",
    "ModelStatus",
    "Progress",
    "cache_root",
    "default_name",
    "entries",
    "find",
    "listing",
    "remove",
    "resolve",
]
