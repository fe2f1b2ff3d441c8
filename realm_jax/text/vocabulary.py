"""The vocabulary of a GGUF file: tokens, their kinds, special ids and the flags that steer a tokenizer.

Everything comes from the `tokenizer.*` metadata, which is untrusted: each key is checked for its type, length and range
before use. What the file leaves open follows llama.cpp's defaults.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

import numpy as np

from ..errors import TokenizerError, UnsupportedModelError
from ..gguf.header import quote
from .pretokenizers import PreTokenizer, pre_tokenizer

MAX_TOKENS = 1 << 24
MAX_TOKEN_LENGTH = 4096


class TokenAttr(IntFlag):
    """What a token is. A token has one base kind; end-of-turn and fill-in-the-middle markers gain CONTROL."""

    UNDEFINED = 0
    UNKNOWN = 1
    UNUSED = 2
    NORMAL = 4
    CONTROL = 8
    USER_DEFINED = 16
    BYTE = 32
    LSTRIP = 64
    RSTRIP = 128


# tokenizer.ggml.token_type value -> attribute; other values count as undefined.
_TOKEN_TYPES = (
    TokenAttr.UNDEFINED,
    TokenAttr.NORMAL,
    TokenAttr.UNKNOWN,
    TokenAttr.CONTROL,
    TokenAttr.USER_DEFINED,
    TokenAttr.UNUSED,
    TokenAttr.BYTE,
)

_SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "fim_pre": "fim_pre_token_id",
    "fim_suf": "fim_suf_token_id",
    "fim_mid": "fim_mid_token_id",
    "fim_pad": "fim_pad_token_id",
    "fim_rep": "fim_rep_token_id",
    "fim_sep": "fim_sep_token_id",
}
# Older files' names of three of them.
_DEPRECATED_KEYS = {"fim_pre": "prefix_token_id", "fim_suf": "suffix_token_id", "fim_mid": "middle_token_id"}

# Ids used where the file names none, if the vocabulary is large enough.
_DEFAULT_IDS = {
    "spm": {"bos": 1, "eos": 2, "unk": 0},
    "bpe": {"bos": 11, "eos": 11},
    "wpm": {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
    "ugm": {"eos": 1, "unk": 2, "pad": 0},
}

# Texts by which special tokens are found when the file does not give their ids, the most telling first.
_KNOWN_TEXTS = {
    "eot": (
        *(
            "<|eot_id|>",
            "<|im_end|>",
            "<|end|>",
            "<end_of_turn>",
            "<|endoftext|>",
            "<|end_of_text|>",
            "<EOT>",
            "_<EOT>",
        ),
        *("[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>"),
    ),
    "eom": ("<|eom_id|>",),
    "fim_pre": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
        *("<|code_prefix|>", "<|prefix|>"),
    ),
    "fim_suf": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
        *("<|code_suffix|>", "<|suffix|>"),
    ),
    "fim_mid": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
        *("<|code_middle|>", "<|middle|>"),
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}

# Texts that end a generation wherever they are tokens.
_END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)

# Structural markers of the harmony format, always part of the text.
_ALWAYS_TEXT = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")

_KINDS = {"llama": "spm", "gpt2": "bpe", "gemma4": "bpe", "whitespace": "bpe", "bert": "wpm", "t5": "ugm"}


@dataclass
class Vocabulary:
    """A checked vocabulary.

    kind: "spm", "bpe", "wpm" or "ugm". tokens: id -> text (bytes that are not UTF-8 as surrogate escapes).
    ids: text -> id. scores: float32 [n] (zeros where the file has none). attrs: id -> TokenAttr value.
    special: names of _SPECIAL_KEYS -> id, absent where there is none."""

    kind: str
    model: str
    pre: PreTokenizer | None
    tokens: list[str]
    ids: dict[str, int]
    scores: np.ndarray
    attrs: list[int]
    special: dict[str, int]
    end_ids: frozenset[int]
    merges: list[tuple[str, str]] = field(default_factory=list)
    charsmap: bytes = b""
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    escape_whitespaces: bool = True
    clean_spaces: bool = False
    lowercase: bool = False
    strip_accents: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


class _Reader:
    """Typed access to the metadata; every mistake names its key."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.metadata = metadata

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return default
        if not isinstance(value, (bool, np.bool_)):
            raise TokenizerError(f"tokenizer.ggml.{name}: {_brief(value)} is not a boolean")
        return bool(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if value is None:
            raise TokenizerError(f"{key} is missing: the file holds no vocabulary")
        if not isinstance(value, str):
            raise TokenizerError(f"{key}: {_brief(value)} is not a string")
        return value

    def strings(self, name: str) -> list[str] | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(map(str.__instancecheck__, value)):
            raise TokenizerError(f"tokenizer.ggml.{name}: {_brief(value)} is not an array of strings")
        return list(value)

    def numbers(self, name: str, kinds: str, described: str, length: int | None = None) -> np.ndarray | None:
        """A numeric array of one of numpy's dtype kinds, of the given length."""
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        array = np.asarray(value) if isinstance(value, (list, tuple, np.ndarray)) else None
        if array is None or array.ndim != 1 or array.dtype.kind not in kinds:
            raise TokenizerError(f"tokenizer.ggml.{name}: {_brief(value)} is not an array of {described}")
        if length is not None and len(array) != length:
            raise TokenizerError(f"tokenizer.ggml.{name} has {len(array)} entries for {length} tokens")
        return array

    def token_id(self, name: str, size: int) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise TokenizerError(f"tokenizer.ggml.{name}: {_brief(value)} is not an integer")
        if not 0 <= int(value) < size:
            raise TokenizerError(f"tokenizer.ggml.{name}: {int(value)} is outside the vocabulary of {size} tokens")
        return int(value)


def _brief(value: Any) -> str:
    if isinstance(value, (list, tuple, np.ndarray)):
        return f"an array of {len(value)} values"
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Check the `tokenizer.*` metadata and build the vocabulary.

    Raises TokenizerError for inconsistent metadata, UnsupportedModelError for a kind that is not implemented."""
    reader = _Reader(metadata)
    model = reader.text("tokenizer.ggml.model")
    kind = _KINDS.get(model)
    if kind is None:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model: {quote(model)} is not implemented; implemented: {', '.join(sorted(_KINDS))}"
        )
    pre = None
    if kind == "bpe":
        name = "gemma4" if model == "gemma4" else reader.text("tokenizer.ggml.pre", "") or "default"
        pre = pre_tokenizer(name)

    tokens, ids = _read_tokens(reader)
    size = len(tokens)
    attrs = _read_attrs(reader, tokens)
    scores = _read_scores(reader, size, needed=kind in ("spm", "ugm"))
    special = _read_special_ids(reader, model, kind, pre, size, attrs)
    end_ids = _classify_special_tokens(tokens, ids, attrs, special)
    _strip_around_special(metadata, reader, pre, ids, attrs)

    lowercase = reader.flag("normalizer.lowercase", True)
    vocabulary = Vocabulary(
        kind=kind,
        model=model,
        pre=pre,
        tokens=tokens,
        ids=ids,
        scores=scores,
        attrs=attrs,
        special=special,
        end_ids=end_ids,
        merges=_read_merges(reader, ids, required=pre is None or pre.name != "kimi-k2") if kind == "bpe" else [],
        charsmap=_read_charsmap(reader) if kind == "ugm" else b"",
        add_bos=reader.flag("add_bos_token", pre.add_bos if pre else kind in ("spm", "wpm")),
        add_eos=reader.flag("add_eos_token", kind == "ugm"),
        add_space_prefix=reader.flag("add_space_prefix", kind == "spm"),
        remove_extra_whitespaces=reader.flag("remove_extra_whitespaces", False),
        escape_whitespaces=pre.escape_whitespaces if pre else True,
        clean_spaces=pre.clean_spaces if pre else kind == "wpm",
        lowercase=lowercase if model != "whitespace" else reader.flag("normalizer.lowercase", False),
        strip_accents=reader.flag("normalizer.strip_accents", lowercase),
    )
    if pre is not None and pre.newline_runs:
        vocabulary.add_bos = True  # published Gemma 4 files say false and mean true; llama.cpp overrides them as well
    _check_added_ids(vocabulary)
    return vocabulary


def _read_tokens(reader: _Reader) -> tuple[list[str], dict[str, int]]:
    tokens = reader.strings("tokens")
    if tokens is None:
        raise TokenizerError("tokenizer.ggml.tokens is missing: the file holds no vocabulary")
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise TokenizerError(f"tokenizer.ggml.tokens has {len(tokens)} entries; 1 to {MAX_TOKENS} are accepted")
    if "" in tokens:
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    longest = max(range(len(tokens)), key=list(map(len, tokens)).__getitem__)
    if len(tokens[longest]) > MAX_TOKEN_LENGTH:
        raise TokenizerError(
            f"tokenizer.ggml.tokens[{longest}] has {len(tokens[longest])} characters; {MAX_TOKEN_LENGTH} are the most"
        )
    ids = dict(zip(tokens, range(len(tokens))))
    if len(ids) != len(tokens):
        second = next(i for i, token in enumerate(tokens) if ids[token] != i)
        raise TokenizerError(
            f"tokenizer.ggml.tokens: entries {second} and {ids[tokens[second]]} are both {_brief(tokens[second])}"
        )
    return tokens, ids


def _read_attrs(reader: _Reader, tokens: Sequence[str]) -> list[int]:
    types = reader.numbers("token_type", "iu", "integers", len(tokens))
    if types is None:
        return [int(TokenAttr.NORMAL)] * len(tokens)
    known = np.where((types >= 0) & (types < len(_TOKEN_TYPES)), types, 0).astype(np.int64)
    attrs = np.array([int(attr) for attr in _TOKEN_TYPES])[known]
    for i in np.flatnonzero(attrs == TokenAttr.BYTE).tolist():
        if not _BYTE_TOKEN.fullmatch(tokens[i]):
            raise TokenizerError(
                f"tokenizer.ggml.tokens[{i}]: {_brief(tokens[i])} is marked as a byte; <0x00> to <0xFF> are accepted"
            )
    return attrs.tolist()


def _read_scores(reader: _Reader, size: int, needed: bool) -> np.ndarray:
    scores = reader.numbers("scores", "fi", "numbers", size)
    if scores is None:
        if needed:
            raise TokenizerError("tokenizer.ggml.scores is missing; this kind of vocabulary needs it")
        return np.zeros(size, np.float32)
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise TokenizerError(f"tokenizer.ggml.scores[{bad}]: {scores[bad]} is not a finite number")
    return scores.astype(np.float32)


def _read_special_ids(
    reader: _Reader, model: str, kind: str, pre: PreTokenizer | None, size: int, attrs: Sequence[int]
) -> dict[str, int]:
    defaults = {name: id for name, id in _DEFAULT_IDS[kind].items() if id < size}
    if kind == "bpe":
        # Id 11 is Falcon's <|endoftext|>; in another vocabulary it would be a comma.
        defaults = {name: id for name, id in defaults.items() if attrs[id] & TokenAttr.CONTROL}
        if model == "gemma4":
            defaults = {}
        if pre is not None and pre.no_bos:
            defaults.pop("bos", None)
    special = {}
    for name, key in _SPECIAL_KEYS.items():
        id = reader.token_id(key, size)
        if name in _DEPRECATED_KEYS:
            deprecated = reader.token_id(_DEPRECATED_KEYS[name], size)
            id = deprecated if deprecated is not None else id
        if id is None:
            id = defaults.get(name)
        if id is not None:
            special[name] = id
    return special


def _classify_special_tokens(
    tokens: Sequence[str], ids: Mapping[str, int], attrs: list[int], special: dict[str, int]
) -> frozenset[int]:
    """Find special tokens by their texts, mark them, and collect the ids that end a generation.

    The order of the rules is llama.cpp's. Changes attrs and special in place."""
    for name, texts in _KNOWN_TEXTS.items():
        if name not in special:
            id = next((ids[text] for text in texts if text in ids), None)
            if id is not None:
                special[name] = id
                attrs[id] |= TokenAttr.CONTROL
    for id in np.flatnonzero(np.array(attrs) & TokenAttr.CONTROL).tolist():
        if "unused" in tokens[id]:
            attrs[id] |= TokenAttr.UNUSED

    ends = {special[name] for name in ("fim_pad", "fim_rep", "fim_sep") if name in special}
    for text in _END_TEXTS:
        if text in ids:
            ends.add(ids[text])
            attrs[ids[text]] |= TokenAttr.CONTROL
    for text in _ALWAYS_TEXT:
        if text in ids:
            attrs[ids[text]] = int(TokenAttr.USER_DEFINED)
    ends.update(special[name] for name in ("eos", "eot", "eom") if name in special)

    def ends_with(*texts: str) -> bool:
        return any(ids.get(text) in ends for text in texts)

    # Harmony and Solar use <|end|> between messages, Gemma 4 and PLaMo keep </s> as ordinary text.
    call = ends_with("<|call|>", "<|calls|>")
    if call and ends_with("<|end|>") and ends_with("<|return|>", "<|flush|>"):
        ends.remove(ids["<|end|>"])
        attrs[ids["<|end|>"]] = int(TokenAttr.USER_DEFINED)
    if ends_with("<|tool_response>", "<|plamo:eos|>") and ends_with("</s>"):
        ends.remove(ids["</s>"])
        attrs[ids["</s>"]] = int(TokenAttr.NORMAL)
    return frozenset(ends)


def _strip_around_special(
    metadata: Mapping[str, Any], reader: _Reader, pre: PreTokenizer | None, ids: Mapping[str, int], attrs: list[int]
) -> None:
    """Mark special tokens that swallow the white space beside them. GGUF has no key for it: names of models decide."""
    name = reader.text("general.name", "").lower()
    architecture = reader.text("general.architecture", "")
    pre_name = pre.name if pre else ""
    if any(part in pre_name for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or any(
        part in architecture for part in ("nomic-bert-moe", "jina-bert-v3")
    ):
        if "<mask>" in ids:
            attrs[ids["<mask>"]] |= TokenAttr.LSTRIP
    elif "phi-3" in name or "phi3" in name:
        matched = TokenAttr.CONTROL | TokenAttr.USER_DEFINED | TokenAttr.UNKNOWN
        for id in np.flatnonzero(np.array(attrs) & matched).tolist():
            attrs[id] |= TokenAttr.RSTRIP
        if "</s>" in ids:
            attrs[ids["</s>"]] |= TokenAttr.RSTRIP
        for text in ("<unk>", "<s>", "<|endoftext|>"):
            if text in ids:
                attrs[ids[text]] &= ~TokenAttr.RSTRIP
    elif "modern-bert" in name and "[MASK]" in ids:
        attrs[ids["[MASK]"]] |= TokenAttr.LSTRIP


def _read_merges(reader: _Reader, ids: Mapping[str, int], required: bool) -> list[tuple[str, str]]:
    lines = reader.strings("merges")
    if lines is None:
        if required:
            raise TokenizerError("tokenizer.ggml.merges is missing; byte-level BPE needs it")
        return []
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    for i, (left, right) in enumerate(merges):
        if left + right not in ids or left not in ids or right not in ids:
            merges[i] = _odd_merge(i, lines[i], ids)
    return merges


def _odd_merge(i: int, line: str, ids: Mapping[str, int]) -> tuple[str, str]:
    """A merge whose first token begins with a space, or else a TokenizerError."""
    at = line.find(" ", 1)
    left, right = line[:at], line[at + 1 :]
    if at < 0 or not right:
        raise TokenizerError(f"tokenizer.ggml.merges[{i}]: {_brief(line)} is not two tokens separated by a space")
    for part in (left, right, left + right):
        if part not in ids:
            raise TokenizerError(f"tokenizer.ggml.merges[{i}]: {_brief(part)} is not in the vocabulary")
    return left, right


def _read_charsmap(reader: _Reader) -> bytes:
    array = reader.numbers("precompiled_charsmap", "iu", "bytes")
    if array is None or not len(array):
        return b""
    if array.dtype.itemsize != 1:
        if array.min() < -128 or array.max() > 255:
            raise TokenizerError("tokenizer.ggml.precompiled_charsmap: values outside a byte's range")
        array = (array & 0xFF).astype(np.uint8)
    return array.tobytes()


def _check_added_ids(vocabulary: Vocabulary) -> None:
    always = vocabulary.kind == "wpm"
    needs = [
        ("bos", vocabulary.add_bos or always, "add_bos_token"),
        ("eos", vocabulary.add_eos and vocabulary.kind != "wpm", "add_eos_token"),
        ("sep", always, "the vocabulary's kind"),
        ("unk", vocabulary.kind in ("wpm", "ugm"), "the vocabulary's kind"),
    ]
    for name, needed, reason in needs:
        if needed and name not in vocabulary.special:
            raise TokenizerError(f"tokenizer.ggml.{_SPECIAL_KEYS[name]} is missing, but {reason} calls for it")
