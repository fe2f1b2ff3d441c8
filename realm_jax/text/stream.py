"""Turning a stream of tokens into text as it comes."""

import codecs

from .tokenizer import Tokenizer


class StreamDetokenizer:
    """Text of tokens that arrive one at a time, never half a character.

    The pieces joined equal `tokenizer.decode(tokens, skip_special, keep_leading_space=...)`. For the continuation of a
    prompt, keep_leading_space=True keeps the space before the first word."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, keep_leading_space: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip = tokenizer.add_space_prefix and not keep_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is complete with this token, possibly empty."""
        if self._skip_special and self._tokenizer.is_special(token):
            return ""
        piece = self._tokenizer.token_bytes(token)
        if self._strip:
            piece = piece.removeprefix(b" ")
            self._strip = False
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed, else nothing. The stream can be used anew."""
        return self._decoder.decode(b"", final=True)
