"""The tokenizer: text to ids and back."""

import os
import re
from collections.abc import Iterable, Mapping
from operator import index
from typing import Any, Protocol, SupportsIndex

from ..errors import InvalidRequestError
from ..gguf import open_gguf
from .bpe import CHARACTER_BYTES, BytePairEncoder
from .special_tokens import SpecialTokenSplitter
from .spm import SentencePieceEncoder
from .unigram import UnigramEncoder
from .vocabulary import TokenAttr, Vocabulary, read_vocabulary
from .wordpiece import WordPieceEncoder

_HIDDEN = TokenAttr.CONTROL | TokenAttr.UNKNOWN


class _Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


class Tokenizer:
    """A tokenizer built from a GGUF file's own metadata; ids equal llama.cpp's.

    kind: "spm", "bpe", "wpm" or "ugm". pre: the pre-tokenizer's name, for "bpe". vocab_size: number of tokens.
    bos_id, eos_id, eot_id, unk_id, sep_id, pad_id, mask_id: special ids, None where the file has none.
    eog_ids: every id that ends a generation."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._encoder: _Encoder
        if vocabulary.kind == "bpe":
            self._encoder = BytePairEncoder(vocabulary)
        elif vocabulary.kind == "spm":
            self._encoder = SentencePieceEncoder(vocabulary)
        elif vocabulary.kind == "wpm":
            self._encoder = WordPieceEncoder(vocabulary)
        else:
            self._encoder = UnigramEncoder(vocabulary)
        self._splitter = SpecialTokenSplitter(vocabulary)
        self._bytes: dict[int, bytes] = {}
        special = vocabulary.special
        self.kind = vocabulary.kind
        self.pre = vocabulary.pre.name if vocabulary.pre else None
        self.vocab_size = len(vocabulary)
        self.bos_id = special.get("bos")
        self.eos_id = special.get("eos")
        self.eot_id = special.get("eot")
        self.unk_id = special.get("unk")
        self.sep_id = special.get("sep")
        self.pad_id = special.get("pad")
        self.mask_id = special.get("mask")
        self.add_bos = vocabulary.add_bos
        self.add_eos = vocabulary.add_eos
        self.add_space_prefix = vocabulary.add_space_prefix
        self.eog_ids = vocabulary.end_ids

    def __repr__(self) -> str:
        pre = f", pre={self.pre!r}" if self.pre else ""
        return f"Tokenizer(kind={self.kind!r}{pre}, vocab_size={self.vocab_size})"

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        add_special: add the tokens the model expects around a text (BOS, EOS, or CLS and SEP), as the file says.
        parse_special: turn the texts of control tokens (such as `<|im_start|>`) into those tokens; leave it off for
        text from users. User-defined tokens are matched either way. Raises InvalidRequestError for a text that is
        not valid Unicode."""
        _check_text(text)
        vocabulary = self._vocabulary
        out: list[int] = []
        wpm = vocabulary.kind == "wpm"
        if add_special and (vocabulary.add_bos or wpm):
            out.append(vocabulary.special["bos"])
        after_special = True  # the start of a text counts as the place after a special token
        prefix_space = vocabulary.kind == "spm" and vocabulary.add_space_prefix
        for fragment in self._splitter.split(text, parse_special):
            if isinstance(fragment, int):
                out.append(fragment)
                after_special = True
            else:
                out += self._encoder.encode(" " + fragment if prefix_space and after_special else fragment)
                after_special = False
        if add_special and wpm:
            out.append(vocabulary.special["sep"])
        elif add_special and vocabulary.add_eos:
            out.append(vocabulary.special["eos"])
        return out

    def decode(
        self,
        tokens: Iterable[int],
        skip_special: bool = False,
        *,
        keep_leading_space: bool = False,
        clean_up_spaces: bool = False,
    ) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD.

        skip_special: leave control and unknown tokens out. keep_leading_space: keep the space that a SentencePiece
        tokenizer puts before a text, as is right for the continuation of a text. clean_up_spaces: drop spaces before
        punctuation where the file's pre-tokenizer does so in llama.cpp (this changes texts that had such spaces).
        Raises InvalidRequestError for an id outside the vocabulary."""
        data = b"".join(self._pieces(tokens, skip_special, keep_leading_space))
        if clean_up_spaces and self._vocabulary.clean_spaces:
            data = _clean_up_spaces(data)
        return data.decode("utf-8", "replace")

    def _pieces(self, tokens: Iterable[int], skip_special: bool, keep_leading_space: bool) -> Iterable[bytes]:
        strip = self.add_space_prefix and not keep_leading_space
        for token in tokens:
            piece = b"" if skip_special and self.is_special(token) else self.token_bytes(token)
            if strip and not (skip_special and self.is_special(token)):
                piece = piece.removeprefix(b" ")
                strip = False
            yield piece

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; a control token's are its text.

        Raises InvalidRequestError for an id outside the vocabulary."""
        known = self._bytes.get(id)
        if known is None:
            id = self._checked(id)
            known = self._bytes[id] = self._token_bytes(id)
        return known

    def token_text(self, id: int) -> str:
        """The token's entry in the vocabulary, as the file has it."""
        return self._vocabulary.tokens[self._checked(id)]

    def token_id(self, text: str) -> int | None:
        """The id of the vocabulary entry with exactly this text, None if there is none."""
        return self._vocabulary.ids.get(text)

    def is_special(self, id: int) -> bool:
        """Whether a token is a control or unknown token, which `decode(skip_special=True)` leaves out."""
        return bool(self._vocabulary.attrs[self._checked(id)] & _HIDDEN)

    def _checked(self, id: int) -> int:
        if type(id) is not int and not isinstance(id, SupportsIndex):  # the second test takes 20 times as long
            raise InvalidRequestError(f"token id {id!r} is not an integer")
        id = index(id)
        if not 0 <= id < self.vocab_size:
            raise InvalidRequestError(f"token id {id} is outside the vocabulary of {self.vocab_size} tokens")
        return id

    def _token_bytes(self, id: int) -> bytes:
        text, attr = self._vocabulary.tokens[id], self._vocabulary.attrs[id]
        if attr & (_HIDDEN | TokenAttr.USER_DEFINED):
            return text.encode("utf-8", "surrogateescape")
        if attr & TokenAttr.NORMAL:
            if self._vocabulary.pre is not None and self._vocabulary.pre.byte_encode:
                return b"".join(
                    bytes([CHARACTER_BYTES[char]])
                    if char in CHARACTER_BYTES
                    else char.encode("utf-8", "surrogateescape")
                    for char in text
                )
            return text.replace("▁", " ").encode("utf-8", "surrogateescape")
        if attr & TokenAttr.BYTE:
            return bytes([int(text[3:5], 16)])
        return b""  # unused and undefined tokens stand for nothing


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise InvalidRequestError(f"text: {type(text).__name__} is not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"text: lone surrogate U+{ord(text[error.start]):04X} at character {error.start} is not valid Unicode"
            ) from None


def _clean_up_spaces(data: bytes) -> bytes:
    """Drop spaces before punctuation and around apostrophes, in llama.cpp's three passes."""
    data = re.sub(rb" (?=[?!.,])", b"", data)
    data = data.replace(b" ' ", b"'")
    return re.sub(rb" (?='(?:[sm]|re|ve))", b"", data)


def load_tokenizer(source: Any) -> Tokenizer:
    """A tokenizer from a GGUF file: its path, an open GGUFFile, or a metadata mapping; vocabulary-only files too.

    Raises GGUFError for a damaged file, TokenizerError for inconsistent metadata, UnsupportedModelError for a kind of
    vocabulary or pre-tokenizer that is not implemented."""
    if isinstance(source, (str, os.PathLike)):
        with open_gguf(source) as file:
            return Tokenizer(read_vocabulary(file.metadata))
    return Tokenizer(read_vocabulary(metadata_of(source)))


def metadata_of(source: Any) -> Mapping[str, Any]:
    """The metadata of an open GGUFFile, or a metadata mapping as it is."""
    metadata = source if isinstance(source, Mapping) else getattr(source, "metadata", None)
    if not isinstance(metadata, Mapping):
        raise TypeError(f"{type(source).__name__} is neither a path, nor an open GGUF file, nor a metadata mapping")
    return metadata
