"""Ids of the words seen lately: texts repeat their words, and encoding one costs far more than looking it up."""

from collections.abc import Callable

_WORDS = 1 << 16
_LENGTH = 64  # characters; longer words hardly come again


class WordCache(dict[str, list[int]]):
    """word -> its ids, by `encode` on first sight. Bounded; callers must not change the lists."""

    def __init__(self, encode: Callable[[str], list[int]]):
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= _LENGTH:
            if len(self) >= _WORDS:
                self.clear()
            self[word] = ids
        return ids
