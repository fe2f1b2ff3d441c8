"""Text: tokenizers from a file's own metadata, streaming detokenizers and chat templates. Needs no JAX."""

from .stream import StreamDetokenizer
from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["StreamDetokenizer", "Tokenizer", "load_tokenizer"]
