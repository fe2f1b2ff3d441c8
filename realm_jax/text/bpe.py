"""Byte-pair encoding with the merges of the file."""

import re

from tokenizers import models

from .unicode_classes import WHITESPACE, simple_lower
from .vocabulary import Vocabulary
from .word_cache import WordCache

_SURROGATES = re.compile("[\ud800-\udfff]")


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte: itself where it is printable Latin-1, else U+0100 onwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update((byte, chr(0x100 + i)) for i, byte in enumerate(others))
    return table


_BYTE_CHARACTERS = byte_characters()
CHARACTER_BYTES = {char: byte for byte, char in _BYTE_CHARACTERS.items()}
"""The inverse of `byte_characters()`."""


class BytePairEncoder:
    """Encodes text without special tokens. The merging itself is done by the `tokenizers` library's BPE model."""

    def __init__(self, vocabulary: Vocabulary):
        assert vocabulary.pre is not None
        self.pre = vocabulary.pre
        self.ids = vocabulary.ids
        self.lowercase = vocabulary.model == "whitespace" and vocabulary.lowercase
        self.drop_whitespace = vocabulary.model == "whitespace"
        self._collapse = self.pre.collapse_table()
        # A merge listed twice keeps its first rank. Tokens that are not valid UTF-8 cannot take part in merges.
        merges = list(dict.fromkeys(vocabulary.merges))
        vocab = vocabulary.ids
        if _SURROGATES.search("".join(vocab)):
            vocab = {token: id for token, id in vocab.items() if not _SURROGATES.search(token)}
        self._model = models.BPE(vocab=vocab, merges=merges)
        self._words = WordCache(self._encode_word)

    def encode(self, text: str) -> list[int]:
        if self.drop_whitespace:
            return self._encode_segments(text)
        if self.pre.escape_whitespaces:
            text = text.replace(" ", "▁")
        return self._encode_text(text)

    def _encode_segments(self, text: str) -> list[int]:
        """The "whitespace" model drops white space before anything else, and may lower the case."""
        if self.lowercase:
            text = "".join(map(simple_lower, text))
        out: list[int] = []
        for segment in "".join(" " if char in WHITESPACE else char for char in text).split(" "):
            out += self._encode_text(segment)
        return out

    def _encode_text(self, text: str) -> list[int]:
        out: list[int] = []
        for word in self.pre.split(text, self._collapse):
            out += self._words[word]
        return out

    def _encode_word(self, word: str) -> list[int]:
        if self.pre.byte_encode:
            word = word.encode().decode("latin-1").translate(_BYTE_CHARACTERS)
        whole = self.ids.get(word)
        if whole is not None and (self.pre.ignore_merges or (self.pre.newline_runs and word[0] == "\n")):
            return [whole]
        # Characters that are no token cannot be merged: they cut the word, and fall back to bytes.
        known = self.ids
        if all(char in known for char in set(word)):
            return [token.id for token in self._model.tokenize(word)]
        out: list[int] = []
        start = 0
        for at, char in enumerate(word):
            if char not in known:
                out += (token.id for token in self._model.tokenize(word[start:at])) if at > start else ()
                out += self._bytes_of_unknown(char)
                start = at + 1
        if start < len(word):
            out += (token.id for token in self._model.tokenize(word[start:]))
        return out

    def _bytes_of_unknown(self, char: str) -> list[int]:
        """The tokens of a character's bytes, as far as the vocabulary has them."""
        if self.pre.byte_encode:
            texts = [bytes([byte]).decode("utf-8", "surrogateescape") for byte in char.encode()]
        else:
            texts = [f"<0x{byte:02X}>" for byte in char.encode()]
        return [self.ids[text] for text in texts if text in self.ids]
