"""Finding special tokens in text before the rest of it is encoded."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .vocabulary import TokenAttr, Vocabulary

_C_SPACES = " \t\n\x0b\x0c\r"
_SPACES = re.compile(f"[{_C_SPACES}]*")

Fragment = str | int
"""A piece of text still to be encoded, or the id of a special token found in it."""


class SpecialTokenSplitter:
    """Cuts text at its special tokens: longest tokens first, each at its leftmost places.

    User-defined tokens are always matched, control and unknown tokens only where the caller asks for it. Some tokens
    swallow the white space to their left or right."""

    def __init__(self, vocabulary: Vocabulary):
        matched = int(TokenAttr.CONTROL | TokenAttr.USER_DEFINED | TokenAttr.UNKNOWN)
        hidden = int(TokenAttr.CONTROL | TokenAttr.UNKNOWN)
        attrs = vocabulary.attrs
        special: list[int] = np.flatnonzero(np.array(attrs) & matched).tolist()
        self._texts = {id: vocabulary.tokens[id] for id in special}
        by_length = sorted(special, key=lambda id: -len(self._texts[id].encode("utf-8", "surrogateescape")))
        self._order = {id: rank for rank, id in enumerate(by_length)}
        self._all = _Index((self._texts[id], id) for id in special)
        self._visible = _Index((self._texts[id], id) for id in special if not attrs[id] & hidden)
        self._strips_left = frozenset(id for id in special if attrs[id] & int(TokenAttr.LSTRIP))
        self._strips_right = frozenset(id for id in special if attrs[id] & int(TokenAttr.RSTRIP))

    def split(self, text: str, parse_special: bool) -> list[Fragment]:
        """Cut text into fragments, none of them an empty string."""
        if not text:
            return []
        index = self._all if parse_special else self._visible
        places = index.places(text)
        strips = bool(self._strips_left or self._strips_right)
        if strips and index.has_spaces:
            # What is swallowed can hold other tokens, so the order in which tokens are found shows.
            return self._in_order(text, {id for place in places for id in place.found})
        fragments: list[Fragment] = []
        at = 0
        for place in places:
            if place.start > at:
                fragments.append(text[at : place.start])
            if place.only is not None:
                fragments.append(place.only)
            else:
                fragments += self._in_order(text[place.start : place.end], place.found)
            at = place.end
        if at < len(text):
            fragments.append(text[at:])
        fragments = _joined(fragments)
        return list(self._stripped(fragments)) if strips else fragments

    def _stripped(self, fragments: list[Fragment]) -> Iterator[Fragment]:
        for i, fragment in enumerate(fragments):
            if isinstance(fragment, str):
                if i and fragments[i - 1] in self._strips_right:
                    fragment = fragment.lstrip(_C_SPACES)
                if i + 1 < len(fragments) and fragments[i + 1] in self._strips_left:
                    fragment = fragment.rstrip(_C_SPACES)
                if not fragment:
                    continue
            yield fragment

    def _in_order(self, text: str, found: Iterable[int]) -> list[Fragment]:
        """Cut text at the given tokens one after the other."""
        fragments: list[Fragment] = [text]
        for id in sorted(found, key=self._order.__getitem__):
            token = self._texts[id]
            cut: list[Fragment] = []
            for fragment in fragments:
                if isinstance(fragment, int) or token not in fragment:
                    cut.append(fragment)
                    continue
                at = 0
                while (start := fragment.find(token, at)) >= 0:
                    left = fragment[at:start]
                    if id in self._strips_left:
                        left = left.rstrip(_C_SPACES)
                    if left:
                        cut.append(left)
                    cut.append(id)
                    at = start + len(token)
                    if id in self._strips_right:
                        spaces = _SPACES.match(fragment, at)
                        at = spaces.end() if spaces else at
                if at < len(fragment):
                    cut.append(fragment[at:])
            fragments = cut
        return fragments


def _joined(fragments: Iterable[Fragment]) -> list[Fragment]:
    """The fragments with neighbouring pieces of text made one: a stretch of overlapping tokens leaves some over."""
    out: list[Fragment] = []
    run: list[str] = []
    for fragment in fragments:
        if isinstance(fragment, str):
            run.append(fragment)
            continue
        if run:
            out.append("".join(run))
            run.clear()
        out.append(fragment)
    if run:
        out.append("".join(run))
    return out


@dataclass
class _Place:
    """Tokens found in text[start:end]: `only` if they all begin at its start (it is the longest), else they overlap."""

    start: int
    end: int
    only: int | None
    found: set[int] = field(default_factory=set)


class _Index:
    """Special tokens by their first two characters, to find all their places in one pass over a text."""

    def __init__(self, tokens: Iterable[tuple[str, int]]):
        self._ids = dict(tokens)
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[:2], set()).add(len(text))
        self._lengths = {start: sorted(sizes, reverse=True) for start, sizes in lengths.items()}
        self._first = frozenset(start[0] for start in lengths)
        self.has_spaces = any(char in text for text in self._ids for char in _C_SPACES)

    def places(self, text: str) -> list[_Place]:
        """The disjoint stretches of text that hold special tokens, in order."""
        places: list[_Place] = []
        for at in self._starts(text):
            found = list(self._found_at(text, at))
            if not found:
                continue
            end = at + found[0][0]
            ids = {id for _, id in found}
            if places and at < places[-1].end:
                last = places[-1]
                last.end = max(last.end, end)
                last.only = None
                last.found |= ids
            else:
                places.append(_Place(at, end, found[0][1], ids))
        return places

    def _found_at(self, text: str, at: int) -> Iterator[tuple[int, int]]:
        """(length, id) of every token that begins here, the longest first."""
        for start in dict.fromkeys((text[at : at + 2], text[at])):
            for length in self._lengths.get(start, ()):
                id = self._ids.get(text[at : at + length])
                if id is not None:
                    yield length, id

    def _starts(self, text: str) -> list[int]:
        """Every position whose character begins a special token."""
        starts: list[int] = []
        for char in self._first.intersection(text):
            at = text.find(char)
            while at >= 0:
                starts.append(at)
                at = text.find(char, at + 1)
        starts.sort()
        return starts
