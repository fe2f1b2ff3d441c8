"""The smallest complete vocabularies that llama.cpp and Realm both load: metadata of a GGUF file."""


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


def bpe_vocabulary() -> dict[str, object]:
    """A byte-level BPE vocabulary of 288 tokens: 256 bytes, 29 merges, and bos, eos, pad (285 to 287)."""
    merges = [
        *("Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "Ġ o", "e n", "Ġ c", "i t"),
        *("i s", "a n", "o r", "e s", "Ġ b", "e d", "Ġ f", "in g", "Ġ p", "o u", "Ġa n", "a l", "a r", "Ġt o"),
    ]
    tokens = [*_byte_characters(), *("".join(pair.split(" ")) for pair in merges), "<|bos|>", "<|eos|>", "<|pad|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3] * 3,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.ggml.padding_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def spm_vocabulary() -> dict[str, object]:
    """A SentencePiece vocabulary of 288 tokens: unk, bos, eos, 256 byte tokens, and 29 pieces with falling scores."""
    pieces = [
        *("▁", "e", "t", "a", "o", "i", "n", "s", "h", "r", "d", "l", "u", "▁t", "he"),
        *("▁a", "in", "re", "on", "▁the", "er", "▁s", "at", "▁w", "▁o", "en", "▁c", "it", "is"),
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }


VOCABULARY_SIZE = 288
