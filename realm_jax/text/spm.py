"""SentencePiece's merging by score ("llama" vocabularies), with byte fallback."""

import re
from heapq import heapify, heappop, heappush

from ..errors import TokenizerError
from .vocabulary import Vocabulary
from .word_cache import WordCache


class SentencePieceEncoder:
    """Encodes text without special tokens: adjacent symbols whose joined text is a token are merged, the best score
    first and the leftmost of equals, until no pair is left; what is no token then becomes bytes."""

    def __init__(self, vocabulary: Vocabulary):
        self.ids = vocabulary.ids
        # Sorting keys: smaller is merged first.
        self._cost: list[float] = (-vocabulary.scores).tolist()
        self._cut = word_boundaries(vocabulary.tokens)
        self._words = WordCache(self._merge)

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        for word in self._cut.split(text.replace(" ", "▁")):
            out += self._words[word]
        return out

    def _merge(self, word: str) -> list[int]:
        get, cost = self.ids.get, self._cost
        size = len(word)
        # Symbol i is word[i:end[i]], and 0 marks one merged away; before[i] is the start of the symbol before it.
        end = list(range(1, size + 1))
        before = list(range(-1, size))
        # A pair is (cost, start of its left symbol, end of its right symbol); its text has that extent, and a pair is
        # stale if either symbol has changed since, which shows in the middle.
        queue: list[tuple[float, int, int, int]] = []
        for i in range(size - 1):
            id = get(word[i : i + 2])
            if id is not None:
                queue.append((cost[id], i, i + 1, i + 2))
        heapify(queue)
        while queue:
            _, left, middle, last = heappop(queue)
            if end[left] != middle or end[middle] != last:
                continue
            end[left] = last
            end[middle] = 0
            if last < size:
                before[last] = left
                id = get(word[left : end[last]])
                if id is not None:
                    heappush(queue, (cost[id], left, last, end[last]))
            previous = before[left]
            if previous >= 0:
                id = get(word[previous:last])
                if id is not None:
                    heappush(queue, (cost[id], previous, left, last))
        out: list[int] = []
        at = 0
        while at < size:
            id = get(word[at : end[at]])
            if id is not None:
                out.append(id)
            else:
                out += self._byte_ids(word[at : end[at]])
            at = end[at]
        return out

    def _byte_ids(self, text: str) -> list[int]:
        ids = []
        for byte in text.encode():
            id = self.ids.get(f"<0x{byte:02X}>")
            if id is None:
                id = self.ids.get(bytes([byte]).decode("utf-8", "surrogateescape"))
            if id is None:
                raise TokenizerError(f"{text!r} cannot be encoded: the vocabulary has no token <0x{byte:02X}>")
            ids.append(id)
        return ids


def word_boundaries(tokens: list[str]) -> re.Pattern[str]:
    """An expression for places that no token spans, so that the text between them can be merged on its own.

    That is before a U+2581 (a space) which follows another character, unless some token holds the two side by side."""
    joined = "\n".join(token for token in tokens if "▁" in token[1:])
    inner = sorted(set(re.findall(r"([^▁\n])▁", joined)))
    # A line feed separates tokens in `joined`, so one before a space is looked for apart.
    if any("\n▁" in token for token in tokens):
        inner.append("\n")
    excluded = "".join(re.escape(char) for char in ["▁", *inner])
    return re.compile(rf"(?<=[^{excluded}])(?=▁)")
