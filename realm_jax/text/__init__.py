"""Text: tokenizers from a file's own metadata, streaming detokenizers and chat templates. Needs no JAX."""

from .chat_template import ChatTemplate, load_chat_template
from .stream import StreamDetokenizer
from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "StreamDetokenizer", "Tokenizer", "load_chat_template", "load_tokenizer"]
