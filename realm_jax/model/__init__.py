"""Models: config, weights, and one decoder for every architecture.

Lazy, because reading a config (`realm inspect`) must not import jax.
"""

from typing import TYPE_CHECKING, Any

from realm_jax.model.config import ModelConfig, read_config
from realm_jax.model.tensors import check_model

if TYPE_CHECKING:
    from realm_jax.model.decoder import forward, logits
    from realm_jax.model.params import Model, Params, load_model

__all__ = ["Model", "ModelConfig", "Params", "check_model", "forward", "load_model", "logits", "read_config"]


def __getattr__(name: str) -> Any:
    if name in ("forward", "logits"):
        from realm_jax.model import decoder

        return getattr(decoder, name)
    if name in ("Model", "Params", "load_model"):
        from realm_jax.model import params

        return getattr(params, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
