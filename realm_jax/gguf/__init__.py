"""GGUF files: a reader written for untrusted input. Needs numpy only; nothing here imports jax."""

from realm_jax.gguf.file import GGUFFile, open_gguf
from realm_jax.gguf.header import TensorInfo
from realm_jax.gguf.summary import describe
from realm_jax.gguf.types import GGMLType

__all__ = ["GGMLType", "GGUFFile", "TensorInfo", "describe", "open_gguf"]
