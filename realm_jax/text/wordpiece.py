"""WordPiece ("bert" vocabularies): normalised words, cut greedily into the longest tokens."""

from .unicode_classes import WHITESPACE, first_decomposed, major_category, simple_lower
from .vocabulary import Vocabulary
from .word_cache import WordCache

_ASCII_SYMBOLS = frozenset("$+<=>^`|~")

# The ideographs that are words of their own (the first of the last extension's range is one later than the block's).
_IDEOGRAPHS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


class _Normalizer(dict[int, str]):
    """A str.translate table: white space to a space, controls away, accents and case by the file's flags, and spaces
    around characters that are words of their own."""

    def __init__(self, lowercase: bool, strip_accents: bool):
        super().__init__()
        self.lowercase = lowercase
        self.strip_accents = strip_accents

    def __missing__(self, code: int) -> str:
        out = self[code] = self._normalize(chr(code))
        return out

    def _normalize(self, char: str) -> str:
        if self.strip_accents:
            char = first_decomposed(char)
        if char in WHITESPACE:
            return " "
        category = major_category(char)
        if char in "\0\ufffd" or category == "C" or (self.strip_accents and category == "M"):
            return ""
        alone = category == "P" or char in _ASCII_SYMBOLS
        alone = alone or any(first <= ord(char) <= last for first, last in _IDEOGRAPHS)
        char = simple_lower(char) if self.lowercase else char
        return f" {char} " if alone else char


class WordPieceEncoder:
    """Encodes text without special tokens. Tokens that begin a word carry a U+2581 in the vocabulary."""

    def __init__(self, vocabulary: Vocabulary):
        self.ids = vocabulary.ids
        self.unknown = vocabulary.special["unk"]
        self._longest = max(map(len, vocabulary.tokens))
        self._normalizer = _Normalizer(vocabulary.lowercase, vocabulary.strip_accents)
        self._words = WordCache(self._cut)

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        for word in text.translate(self._normalizer).split(" "):
            if word:
                out += self._words[word]
        return out

    def _cut(self, word: str) -> list[int]:
        """The longest token at each place; a word that cannot be covered is one unknown token."""
        text = "▁" + word
        out: list[int] = []
        at = 0
        while at < len(text):
            for end in range(min(len(text), at + self._longest), at, -1):
                id = self.ids.get(text[at:end])
                if id is not None:
                    out.append(id)
                    at = end
                    break
            else:
                return [self.unknown]
        return out
