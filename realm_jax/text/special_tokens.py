"""Finding special tokens in text before the rest of it is encoded."""

from collections.abc import Iterable, Sequence

import numpy as np

from .vocabulary import TokenAttr, Vocabulary

_C_SPACES = " \t\n\x0b\x0c\r"

Fragment = str | int
"""A piece of text still to be encoded, or the id of a special token found in it."""


class SpecialTokenSplitter:
    """Cuts text at its special tokens: longest tokens first, each at its leftmost places.

    User-defined tokens are always matched, control and unknown tokens only where the caller asks for it."""

    def __init__(self, vocabulary: Vocabulary):
        matched = int(TokenAttr.CONTROL | TokenAttr.USER_DEFINED | TokenAttr.UNKNOWN)
        hidden = int(TokenAttr.CONTROL | TokenAttr.UNKNOWN)
        attrs = vocabulary.attrs
        special = np.flatnonzero(np.array(attrs) & matched).tolist()
        self._attrs = {id: attrs[id] for id in special}
        self._texts = {id: vocabulary.tokens[id] for id in special}
        self._order = {
            id: rank for rank, id in enumerate(sorted(special, key=lambda id: -len(_bytes(self._texts[id]))))
        }
        self._all = _Index((self._texts[id], id) for id in special)
        self._visible = _Index((self._texts[id], id) for id in special if not attrs[id] & hidden)
        self._strips = any(attr & (TokenAttr.LSTRIP | TokenAttr.RSTRIP) for attr in self._attrs.values())

    def split(self, text: str, parse_special: bool) -> list[Fragment]:
        """Cut text into fragments, none of them an empty string."""
        if not text:
            return []
        index = self._all if parse_special else self._visible
        longest, overlap, present = index.scan(text)
        if not longest:
            return [text]
        if overlap or self._strips:
            return self._split_in_order(text, present)
        # Disjoint places: the order in which tokens are looked for makes no difference.
        fragments: list[Fragment] = []
        at = 0
        for start, end, id in longest:
            if start > at:
                fragments.append(text[at:start])
            fragments.append(id)
            at = end
        if at < len(text):
            fragments.append(text[at:])
        return fragments

    def _split_in_order(self, text: str, present: Iterable[int]) -> list[Fragment]:
        fragments: list[Fragment] = [text]
        for id in sorted(present, key=self._order.__getitem__):
            token, attr = self._texts[id], self._attrs[id]
            cut: list[Fragment] = []
            for fragment in fragments:
                if isinstance(fragment, int) or token not in fragment:
                    cut.append(fragment)
                    continue
                at = 0
                while (found := fragment.find(token, at)) >= 0:
                    left = fragment[at:found]
                    if attr & TokenAttr.LSTRIP:
                        left = left.rstrip(_C_SPACES)
                    if left:
                        cut.append(left)
                    cut.append(id)
                    at = found + len(token)
                    if attr & TokenAttr.RSTRIP:
                        at = len(fragment) - len(fragment[at:].lstrip(_C_SPACES))
                if at < len(fragment):
                    cut.append(fragment[at:])
            fragments = cut
        return fragments


class _Index:
    """Special tokens by their first two characters, to find all their places in one pass over a text."""

    def __init__(self, tokens: Iterable[tuple[str, int]]):
        self._ids: dict[str, int] = {}
        lengths: dict[str, set[int]] = {}
        for text, id in tokens:
            self._ids[text] = id
            lengths.setdefault(text[:2], set()).add(len(text))
        self._lengths = {start: sorted(sizes, reverse=True) for start, sizes in lengths.items()}
        self._first = {start[0] for start in lengths}

    def scan(self, text: str) -> tuple[Sequence[tuple[int, int, int]], bool, set[int]]:
        """(start, end, id) of the longest token at each place, whether any of them overlap, and every token found."""
        longest: list[tuple[int, int, int]] = []
        present: set[int] = set()
        overlap = False
        reach = 0
        for at in self._starts(text):
            first = True
            for start in (text[at : at + 2], text[at]):
                for length in self._lengths.get(start, ()):
                    id = self._ids.get(text[at : at + length])
                    if id is not None:
                        present.add(id)
                        if first:
                            first = False
                            overlap |= at < reach
                            reach = max(reach, at + length)
                            longest.append((at, at + length, id))
                if len(start) == 1:
                    break
        return longest, overlap, present

    def _starts(self, text: str) -> list[int]:
        """Every position whose character begins a special token."""
        starts: list[int] = []
        for char in self._first & set(text):
            at = text.find(char)
            while at >= 0:
                starts.append(at)
                at = text.find(char, at + 1)
        starts.sort()
        return starts


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
