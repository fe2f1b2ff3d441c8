"""Character classes of Unicode 15.1, whatever version the running Python knows.

Pre-tokenizers and the BERT normalizer decide by general category, so two Python versions must not disagree about a
character. Python 3.11 knows Unicode 14.0, 3.12 knows 15.0 and 3.13 knows 15.1: the characters that were assigned in
between are listed here (Unicode Character Database, DerivedGeneralCategory), everything else comes from `unicodedata`.
"""

import unicodedata
from bisect import bisect_right

# (first, last, major category) of every character assigned after Unicode 14.0, up to 15.1.
_ASSIGNED_AFTER_14 = (
    (0x0CF3, 0x0CF3, "M"),
    (0x0ECE, 0x0ECE, "M"),
    (0x2FFC, 0x2FFF, "S"),
    (0x31EF, 0x31EF, "S"),
    (0x10EFD, 0x10EFF, "M"),
    (0x1123F, 0x11240, "L"),
    (0x11241, 0x11241, "M"),
    (0x11B00, 0x11B09, "P"),
    (0x11F00, 0x11F01, "M"),
    (0x11F02, 0x11F02, "L"),
    (0x11F03, 0x11F03, "M"),
    (0x11F04, 0x11F10, "L"),
    (0x11F12, 0x11F33, "L"),
    (0x11F34, 0x11F3A, "M"),
    (0x11F3E, 0x11F42, "M"),
    (0x11F43, 0x11F4F, "P"),
    (0x11F50, 0x11F59, "N"),
    (0x1342F, 0x1342F, "L"),
    (0x13439, 0x1343F, "C"),
    (0x13440, 0x13440, "M"),
    (0x13441, 0x13446, "L"),
    (0x13447, 0x13455, "M"),
    (0x1B132, 0x1B132, "L"),
    (0x1B155, 0x1B155, "L"),
    (0x1D2C0, 0x1D2D3, "N"),
    (0x1DF25, 0x1DF2A, "L"),
    (0x1E030, 0x1E06D, "L"),
    (0x1E08F, 0x1E08F, "M"),
    (0x1E4D0, 0x1E4EB, "L"),
    (0x1E4EC, 0x1E4EF, "M"),
    (0x1E4F0, 0x1E4F9, "N"),
    (0x1F6DC, 0x1F6DC, "S"),
    (0x1F774, 0x1F776, "S"),
    (0x1F77B, 0x1F77F, "S"),
    (0x1F7D9, 0x1F7D9, "S"),
    (0x1FA75, 0x1FA77, "S"),
    (0x1FA87, 0x1FA88, "S"),
    (0x1FAAD, 0x1FAAF, "S"),
    (0x1FABB, 0x1FABD, "S"),
    (0x1FABF, 0x1FABF, "S"),
    (0x1FACE, 0x1FACF, "S"),
    (0x1FADA, 0x1FADB, "S"),
    (0x1FAE8, 0x1FAE8, "S"),
    (0x1FAF7, 0x1FAF8, "S"),
    (0x2B739, 0x2B739, "L"),
    (0x2EBF0, 0x2EE5D, "L"),
    (0x31350, 0x323AF, "L"),
)
_FIRST = [first for first, _, _ in _ASSIGNED_AFTER_14]

WHITESPACE = frozenset(
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""The White_Space property (unchanged since Unicode 6.3)."""

_HAN_RANGES = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2EBEF),
    (0x2F800, 0x2FA1F),
)


def major_category(char: str) -> str:
    """The first letter of a character's general category (L, M, N, P, S, Z or C), or "" if it is not assigned."""
    category = unicodedata.category(char)
    code = ord(char)
    if category == "Cn":
        at = bisect_right(_FIRST, code) - 1
        if at >= 0 and code <= _ASSIGNED_AFTER_14[at][1]:
            return _ASSIGNED_AFTER_14[at][2]
        return ""
    return category[0]


def is_han(code: int) -> bool:
    """Whether a code point lies in the blocks of Chinese ideographs (extensions A to F, compatibility blocks)."""
    return any(first <= code <= last for first, last in _HAN_RANGES)


def simple_lower(char: str) -> str:
    """The one-to-one lower case of a character (the full mapping of U+0130 has two characters)."""
    return char.lower()[0]


def first_decomposed(char: str) -> str:
    """The first character of a character's canonical decomposition: its base letter."""
    return unicodedata.normalize("NFD", char)[0]
