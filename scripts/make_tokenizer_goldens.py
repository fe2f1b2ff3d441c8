"""Writes tests/golden/tokenizers: small vocabularies of every kind, and llama.cpp's ids for the nasty texts with them.

    python scripts/make_tokenizer_goldens.py [SMOLLM2.gguf]

Needs llama-cpp-python (the "oracle" extra) and gguf. With the model's file, its ids are written too.
"""

import ctypes
import json
import lzma
import sys
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from text_corpus import NASTY, corpus  # noqa: E402
from text_vocabularies import GOLDENS, cases, charsmap  # noqa: E402

from realm_jax.text.bpe import byte_characters  # noqa: E402

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CALLS = [(add, parse) for add in (False, True) for parse in (False, True)]


class LlamaTokenizer:
    """llama.cpp's tokenizer on a vocabulary-only load of a file."""

    def __init__(self, path: Path):
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = 2 * len(data) + 16
        out = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), out, room, add_special, parse_special)
        assert count >= 0
        return list(out[:count])

    def piece(self, token: int) -> bytes:
        out = ctypes.create_string_buffer(4096)
        count = llama_cpp.llama_token_to_piece(self.vocab, token, out, len(out), 0, True)
        assert count >= 0
        return out.raw[:count]

    def decode(self, tokens: list[int]) -> bytes:
        out = ctypes.create_string_buffer(1 << 16)
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        count = llama_cpp.llama_detokenize(self.vocab, ids, len(tokens), out, len(out), False, True)
        assert count >= 0
        return out.raw[:count]

    def ends(self) -> list[int]:
        return [id for id in range(self.size) if llama_cpp.llama_vocab_is_eog(self.vocab, id)]

    def close(self) -> None:
        llama_cpp.llama_model_free(self.model)


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """A GGUF file that holds the metadata and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def train_merges(texts: list[str], limit: int) -> list[tuple[str, str]]:
    """Byte-pair merges over whole texts, so that tokens span every boundary a pre-tokenizer may draw."""
    words = [list(text) for text in texts]
    merges = []
    while len(merges) < limit:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], -len(pair[0] + pair[1]), pair))
        merges.append(best)
        joined = best[0] + best[1]
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [joined]
                i += 1
    return merges


def byte_level_vocabulary(texts: list[str]) -> dict[str, Any]:
    table = byte_characters()
    specials = {
        "<|endoftext|>": CONTROL,
        "<|im_start|>": CONTROL,
        "<|im_end|>": CONTROL,
        "<unk>": UNKNOWN,
        "<tool>": USER_DEFINED,
        "<tool_box>": USER_DEFINED,
        "<|reserved_unused_1|>": CONTROL,
        "<mask>": CONTROL,
        "[UNUSED]": UNUSED,
        "    ": USER_DEFINED,
    }
    merges = train_merges(["".join(table[byte] for byte in text.encode()) for text in texts], 6000)
    tokens = list(dict.fromkeys([*specials, *table.values(), *(left + right for left, right in merges)]))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [specials.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def raw_vocabulary(texts: list[str]) -> dict[str, Any]:
    """BPE over characters, with bytes as a fallback (Gemma 4's kind); some characters are no tokens on purpose."""
    specials = {"<pad>": CONTROL, "<bos>": CONTROL, "<eos>": CONTROL, "<unk>": UNKNOWN, "<tool>": USER_DEFINED}
    texts = [text.replace(" ", "▁") for text in texts]
    merges = train_merges([part for text in texts for part in text.split("\n")], 1500)
    characters = sorted({char for merge in merges for part in merge for char in part})
    singles = [f"<0x{byte:02X}>" for byte in range(256)] + characters + ["\n", "\n\n", "\n\n\n"]
    tokens = list(dict.fromkeys([*specials, *singles, *(left + right for left, right in merges)]))
    types = {f"<0x{byte:02X}>": BYTE for byte in range(256)} | specials
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def spm_vocabulary(texts: list[str]) -> dict[str, Any]:
    specials = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<tool>": USER_DEFINED, "<tool_box>": USER_DEFINED}
    specials |= {"<|endoftext|>": CONTROL}
    merges = train_merges(["▁" + text.replace(" ", "▁") for text in texts], 1800)
    joined = [left + right for left, right in merges]
    characters = sorted({char for token in joined for char in token} - set("qZ@"))
    tokens = list(dict.fromkeys([*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *joined, *characters]))
    types = {f"<0x{byte:02X}>": BYTE for byte in range(256)} | specials
    # Scores fall with the rank of a merge, in steps of three equal ones.
    rank = {token: i // 3 for i, token in enumerate(joined)}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.scores": [-float(rank.get(token, 2000 if len(token) == 1 else 0)) for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def wordpiece_vocabulary(texts: list[str]) -> dict[str, Any]:
    specials = {"[PAD]": CONTROL, "[UNK]": UNKNOWN, "[CLS]": CONTROL, "[SEP]": CONTROL, "[MASK]": CONTROL}
    words = Counter(word for text in texts for word in text.lower().split())
    pieces = Counter()
    for word, count in words.items():
        for size in (1, 2, 3, 5):
            for at in range(0, len(word) - size + 1):
                pieces[("▁" if at == 0 else "") + word[at : at + size]] += count
        pieces["▁" + word] += count
    tokens = [*specials, *(piece for piece, count in sorted(pieces.items()) if count > 1 or len(piece) == 2)]
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [specials.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
    }


def unigram_vocabulary(texts: list[str]) -> dict[str, Any]:
    specials = {
        "<s>": CONTROL,
        "<pad>": CONTROL,
        "</s>": CONTROL,
        "<unk>": UNKNOWN,
        "<extra_id_0>": USER_DEFINED,
        "<extra_id_1>": USER_DEFINED,
        "zz": UNUSED,
    }
    counts: Counter[str] = Counter()
    for text in texts:
        for word in text.split(" "):
            marked = "▁" + word
            for size in range(1, 7):
                for at in range(len(marked) - size + 1):
                    counts[marked[at : at + size]] += 1
    chosen = [piece for piece, count in sorted(counts.items()) if count > 2 and "\n" not in piece and "\0" not in piece]
    tokens = list(dict.fromkeys([*specials, *chosen]))
    total = sum(counts.values())
    scores = [
        0.0 if token in specials else float(np.float32(np.log(counts[token] / total) * len(token) ** -0.3))
        for token in tokens
    ]
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [specials.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 1,
    }


def results(path: Path, texts: list[str], calls: list[tuple[bool, bool]]) -> dict[str, Any]:
    tokenizer = LlamaTokenizer(path)
    ids = {f"{add:d}{parse:d}": [tokenizer.encode(text, add, parse) for text in texts] for add, parse in calls}
    out = {"ids": ids, "ends": tokenizer.ends()}
    if len(calls) == len(CALLS):
        out["pieces"] = [tokenizer.piece(id).hex() for id in range(tokenizer.size)]
        out["decoded"] = [tokenizer.decode(row).hex() for row in ids["00"]]
    tokenizer.close()
    return out


def save(name: str, value: Any) -> None:
    data = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
    (GOLDENS / name).write_bytes(lzma.compress(data, preset=9))
    print(f"{name}: {(GOLDENS / name).stat().st_size} bytes")


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp's log is of no interest here."""


def silence() -> None:
    """Stop llama.cpp's log."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


def main() -> None:
    silence()
    GOLDENS.mkdir(parents=True, exist_ok=True)
    nasty = [text for group in NASTY.values() for text in group]
    no_nul = [text.replace("\0", "") for text in nasty]  # llama.cpp's tokens end at a NUL
    vocabularies = {
        "byte_level": byte_level_vocabulary([*nasty, *(word for text in nasty for word in text.split())]),
        "raw": raw_vocabulary(no_nul),
        "spm": spm_vocabulary(no_nul),
        "wpm": wordpiece_vocabulary(no_nul),
        "ugm": unigram_vocabulary(no_nul),
    }
    save("vocabularies.json.xz", vocabularies)
    texts = corpus()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        written: dict[str, dict[str, Any]] = {}
        for case in cases():
            metadata = vocabularies[case.vocabulary] | case.changes
            if case.charsmap:
                metadata["tokenizer.ggml.precompiled_charsmap"] = charsmap()
            print(case.name, flush=True)
            write_vocabulary(path, metadata)
            result = results(path, texts, CALLS if case.detailed else [(False, False), (True, True)])
            key = json.dumps(result, sort_keys=True)  # many names share one way of cutting: it is written once
            written.setdefault(key, result | {"cases": []})["cases"].append(case.name)
            path.unlink()
    save("ids.json.xz", sorted(written.values(), key=lambda entry: entry["cases"]))
    print(f"{len(cases())} vocabularies, {len(written)} distinct, {len(texts)} texts")
    if len(sys.argv) > 1:
        result = results(Path(sys.argv[1]), texts, CALLS)
        del result["pieces"]
        save("smollm2.json.xz", result)


if __name__ == "__main__":
    main()
