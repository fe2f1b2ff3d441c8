"""Realm: a JAX/XLA-compiled, multi-tenant inference runtime for language models in GGUF files.

    from realm_jax import LLM, SamplingParams

    with LLM("model.gguf") as llm:
        print(llm.generate("The capital of France is", SamplingParams(max_tokens=16)).text)

Names are loaded when first used, so that reading a file's header or tokenizing text does not import jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from realm_jax.errors import (
    AdapterError,
    BackendError,
    CapacityError,
    ChatTemplateError,
    CheckpointError,
    ClusterError,
    DownloadError,
    GGUFError,
    InvalidRequestError,
    MissingPackageError,
    ModelNotFoundError,
    QuotaError,
    RealmError,
    TokenizerError,
    UnsupportedModelError,
)
from realm_jax.interrupt import interrupt_deferred

if TYPE_CHECKING:
    from realm_jax.engine.engine import Engine, Request
    from realm_jax.engine.tenants import Tenant
    from realm_jax.llm import LLM
    from realm_jax.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AdapterError",
    "BackendError",
    "CapacityError",
    "ChatTemplateError",
    "CheckpointError",
    "ClusterError",
    "DownloadError",
    "Engine",
    "GGUFError",
    "InvalidRequestError",
    "MissingPackageError",
    "ModelNotFoundError",
    "QuotaError",
    "RealmError",
    "Request",
    "SamplingParams",
    "Tenant",
    "TokenizerError",
    "UnsupportedModelError",
]

_LAZY = {
    "LLM": "realm_jax.llm",
    "SamplingParams": "realm_jax.sampling_params",
    "Engine": "realm_jax.engine.engine",
    "Request": "realm_jax.engine.engine",
    "Tenant": "realm_jax.engine.tenants",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        with interrupt_deferred():  # a Ctrl-C while jax is imported may end the process with a traceback of C++
            return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
