"""Unigram ("t5" vocabularies): the segmentation with the best sum of scores, after SentencePiece's normalisation."""

from .charsmap import Charsmap
from .spm import word_boundaries
from .vocabulary import TokenAttr, Vocabulary
from .word_cache import WordCache

_UNKNOWN_PENALTY = 10.0


class UnigramEncoder:
    """Encodes text without special tokens by the Viterbi algorithm.

    A character that is no token costs the lowest score of the vocabulary less 10; unknown characters in a row become
    one unknown token."""

    def __init__(self, vocabulary: Vocabulary):
        attrs, scores = vocabulary.attrs, vocabulary.scores.tolist()
        normal_kind, user_kind = int(TokenAttr.NORMAL), int(TokenAttr.USER_DEFINED)
        usable = int(TokenAttr.NORMAL | TokenAttr.USER_DEFINED | TokenAttr.UNUSED)
        normal = [score for score, attr in zip(scores, attrs) if attr & normal_kind]
        self.unknown = vocabulary.special["unk"]
        self._unknown_score = min(normal, default=0.0) - _UNKNOWN_PENALTY
        self._tokens: dict[str, tuple[int, float]] = {}
        self._longest: dict[str, int] = {}
        user_defined = []
        for id, (token, attr) in enumerate(zip(vocabulary.tokens, attrs)):
            if attr & usable:
                self._tokens[token] = (id, 0.0 if attr & user_kind else scores[id])
                start = token[:2]
                if len(token) > self._longest.get(start, 0):
                    self._longest[start] = len(token)
            if attr & user_kind:
                user_defined.append(token)
        self._cut = word_boundaries([*self._tokens])
        self._normalizer = Charsmap(vocabulary.charsmap, user_defined)
        self._space = "▁" if vocabulary.escape_whitespaces else " "
        self._prefix = vocabulary.add_space_prefix
        self._merge_spaces = vocabulary.remove_extra_whitespaces
        self._words = WordCache(self._best)

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        for word in self._cut.split(self._spaced(self._normalizer.normalize(text))):
            ids = self._words[word]
            if out and ids and out[-1] == self.unknown == ids[0]:
                ids = ids[1:]
            out += ids
        return out

    def _spaced(self, text: str) -> str:
        """Spaces to U+2581, with one before the first word, and runs of them as one, where the file says so."""
        if self._merge_spaces:
            words = [word for word in text.split(" ") if word]
            return "".join(self._space + word for word in words)
        stripped = text.lstrip(" ")
        if self._prefix and stripped:
            text = text[: len(text) - len(stripped)] + " " + stripped
        return text.replace(" ", self._space)

    def _best(self, text: str) -> list[int]:
        size = len(text)
        best = [float("-inf")] * (size + 1)
        best[0] = 0.0
        token_at = [self.unknown] * (size + 1)
        start_at = [0] * (size + 1)
        tokens, longest = self._tokens, self._longest
        for at in range(size):
            score = best[at]
            single = False
            limit = max(longest.get(text[at : at + 2], 1), 1)
            for end in range(at + 1, min(at + limit, size) + 1):
                entry = tokens.get(text[at:end])
                if entry is not None:
                    single |= end == at + 1
                    challenger = score + entry[1]
                    if challenger > best[end]:
                        best[end] = challenger
                        token_at[end] = entry[0]
                        start_at[end] = at
            if not single:
                challenger = score + self._unknown_score
                if challenger > best[at + 1]:
                    best[at + 1] = challenger
                    token_at[at + 1] = self.unknown
                    start_at[at + 1] = at
        out: list[int] = []
        at = size
        while at > 0:
            id = token_at[at]
            if not (out and id == self.unknown == out[-1]):
                out.append(id)
            at = start_at[at]
        out.reverse()
        return out
