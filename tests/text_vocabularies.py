"""The small vocabularies that tokenizer tests use, and the variants of them that are compared with llama.cpp."""

import json
import lzma
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from realm_jax.text.pretokenizers import PRE_TOKENIZERS

GOLDENS = Path(__file__).parent / "golden" / "tokenizers"


@dataclass(frozen=True)
class Case:
    """One vocabulary with some metadata changed. detailed: all four ways to call, token pieces and decoding too."""

    name: str
    vocabulary: str
    changes: dict[str, Any] = field(default_factory=dict)
    charsmap: bool = False
    detailed: bool = True


def _flags(**flags: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in flags.items()}


def cases() -> list[Case]:
    """Every pre-tokenizer name, and each kind of vocabulary with its flags both ways."""
    out = [
        Case(f"pre {name}", "byte_level" if pre.byte_encode else "raw", _flags(pre=name), detailed=False)
        for name, pre in sorted(PRE_TOKENIZERS.items())
        if name != "whitespace"  # llama.cpp has it for its "whitespace" model only, and aborts on others
    ]
    out += [
        Case("bpe", "byte_level", _flags(pre="gpt-2")),
        Case("bpe without pre", "byte_level"),
        Case("bpe bos eos", "byte_level", _flags(pre="llama-bpe", add_bos_token=True, add_eos_token=True)),
        Case("bpe no bos", "byte_level", _flags(pre="llama-bpe", add_bos_token=False)),
        Case("bpe raw", "raw", _flags(pre="gemma4")),
        Case("bpe gemma4 model", "raw", _flags(model="gemma4")),
        Case("bpe sarvam", "raw", _flags(pre="sarvam-moe")),
        Case("bpe whitespace model", "raw", _flags(model="whitespace", pre="whitespace")),
        Case(
            "bpe whitespace lowercase",
            "raw",
            {"tokenizer.ggml.model": "whitespace", "tokenizer.ggml.pre": "whitespace"}
            | {"tokenizer.ggml.normalizer.lowercase": True},
        ),
        Case("bpe mask", "byte_level", _flags(pre="jina-v2-de")),
        Case("spm", "spm"),
        Case("spm no space prefix", "spm", _flags(add_space_prefix=False)),
        Case("spm eos", "spm", _flags(add_bos_token=False, add_eos_token=True)),
        Case("spm phi-3", "spm", {"general.name": "Phi-3 mini"}),
        Case("wpm", "wpm"),
        Case("wpm cased", "wpm", {"tokenizer.ggml.normalizer.lowercase": False}),
        Case(
            "wpm cased accents",
            "wpm",
            {"tokenizer.ggml.normalizer.lowercase": False, "tokenizer.ggml.normalizer.strip_accents": True},
        ),
        Case("wpm accents", "wpm", {"tokenizer.ggml.normalizer.strip_accents": False}),
        Case("ugm", "ugm", _flags(add_space_prefix=True, remove_extra_whitespaces=True), charsmap=True),
        Case("ugm no prefix", "ugm", _flags(add_space_prefix=False, remove_extra_whitespaces=False), charsmap=True),
        Case("ugm keep spaces", "ugm", _flags(add_space_prefix=True, remove_extra_whitespaces=False), charsmap=True),
        Case("ugm no charsmap", "ugm", _flags(add_space_prefix=True, remove_extra_whitespaces=True)),
        Case("ugm bos", "ugm", _flags(add_bos_token=True, add_eos_token=False, remove_extra_whitespaces=True)),
    ]
    return out


@cache
def _vocabularies() -> dict[str, dict[str, Any]]:
    return read_golden("vocabularies.json.xz")


def metadata(case: Case) -> dict[str, Any]:
    """The tokenizer metadata of a case."""
    out = _vocabularies()[case.vocabulary] | case.changes
    if case.charsmap:
        out["tokenizer.ggml.precompiled_charsmap"] = list(charsmap())
    return out


def vocabulary(name: str, **changes: Any) -> dict[str, Any]:
    """The metadata of a vocabulary, with `tokenizer.ggml.` keys changed, or left out where the change is None."""
    out = _vocabularies()[name] | _flags(**changes)
    return {key: value for key, value in out.items() if value is not None}


def read_golden(name: str) -> Any:
    return json.loads(lzma.decompress((GOLDENS / name).read_bytes()))


REPLACEMENTS = {
    "ﬁ": "fi",
    "ﬂ": "fl",
    "①": "1",
    "½": "1⁄2",
    "²": "2",
    "㍿": "株式会社",
    "\t": " ",
    "\n": " ",
    "\r": " ",
    "\u00a0": " ",
    "\u3000": " ",
    "\u200b": "",
    "\x01": "",
    "e\u0301": "é",
    "n\u0303": "ñ",
    "A\u030a": "Å",
    "A\u030a\u0301": "Ǻ",
    "Å": "Å",
    "Ｆ": "F",
    "ｕ": "u",
    "ｌ": "l",
}


def charsmap(replacements: dict[str, str] = REPLACEMENTS) -> bytes:
    """A precompiled character map in SentencePiece's layout (see realm_jax/text/charsmap.py), placed by first fit."""
    blob = bytearray()
    trie: dict[Any, Any] = {}
    for text, replacement in replacements.items():
        place = trie
        for byte in text.encode():
            place = place.setdefault(byte, {})
        place[None] = len(blob)
        blob += replacement.encode() + b"\0"

    nodes: dict[int, int] = {0: 0}
    used_bases: set[int] = set()

    def place_children(index: int, children: dict[Any, Any]) -> None:
        labels = [0 if label is None else label for label in children]
        base = next(
            base
            for base in range(1, 1 << 20)
            if base not in used_bases and all(base ^ label not in nodes for label in labels)
        )
        used_bases.add(base)
        # The offset is relative to the node's own index, except in the root, whose index is 0.
        nodes[index] |= (base ^ index) << 10 | (1 << 8 if None in children else 0)
        for label, below in children.items():
            if label is None:
                nodes[base] = 1 << 31 | below
            else:
                nodes[base ^ label] = label
        for label, below in children.items():
            if label is not None:
                place_children(base ^ label, below)

    place_children(0, trie)
    array = b"".join(nodes.get(i, 0).to_bytes(4, "little") for i in range(max(nodes) + 257))
    return len(array).to_bytes(4, "little") + array + bytes(blob)
