"""Checkpoints: folders with the packed weights of a model, or the state of a training, written by Orbax.

A folder of them is there whole or not at all. Opening one (`realm inspect`) imports neither jax nor Orbax.
"""

from typing import TYPE_CHECKING, Any

from realm_jax.checkpoint.file import CheckpointFile, open_model

if TYPE_CHECKING:
    from realm_jax.checkpoint.state import load_state, save_state
    from realm_jax.checkpoint.writer import convert

__all__ = ["CheckpointFile", "convert", "load_state", "open_model", "save_state"]


def __getattr__(name: str) -> Any:
    if name == "convert":
        from realm_jax.checkpoint.writer import convert

        return convert
    if name in ("load_state", "save_state"):
        from realm_jax.checkpoint import state

        return getattr(state, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
