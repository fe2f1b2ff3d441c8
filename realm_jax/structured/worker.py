"""The process that tries grammars out: `python -I -S worker.py DIRECTORY...`.

Grammars come from users. llguidance bounds most of what they may cost, but not all: some overflow the stack, which ends
the process, some take gigabytes, and some never end. So each is compiled here first, where memory and the stack are
small and the parent can end it; what passes is compiled again in the parent, for the same cost.

The directories hold llguidance and template_worker, whose frames it speaks. The first frame is {"tokens", "eos",
"special"}, tokens as text in which each character is a byte; the answer is {"ready"}. Each further one is {"grammar"},
and its answer {"error"}, empty for a grammar that can be used.
"""

import sys
import threading
from typing import Any

STACK = 1 << 20  # bytes: less than any thread of the parent has
# Of llguidance's parser, below its defaults: what one mask may take, of time and, in states of 1 to 2 kB, of memory.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 500,
    "step_max_items": 10_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}


class Vocabulary:
    """What llguidance asks of a tokenizer. Texts are encoded by single bytes: how is of no matter to limits."""

    def __init__(self, tokens: list[bytes], eos: list[int], special: list[int]):
        self.tokens = tokens
        self.eos_token_id = eos[0]
        self.bos_token_id = None
        self.special_token_ids = special
        hidden = set(special)
        self._ids: dict[bytes, int] = {}
        for token, piece in enumerate(tokens):
            if token not in hidden:
                self._ids.setdefault(piece, token)

    def __call__(self, data: bytes | str) -> list[int]:
        data = data.encode() if isinstance(data, str) else data
        return [self._ids[data[i : i + 1]] for i in range(len(data)) if data[i : i + 1] in self._ids]


def attempt(tokenizer: Any, grammar: str) -> str:
    """Compiles a grammar and takes its first mask; what is wrong with it."""
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error()


def main() -> None:
    sys.path += sys.argv[1:]
    from llguidance import LLTokenizer, TokenizerWrapper
    from template_worker import limit_memory, read_frame, write_frame

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    limit_memory()
    first = read_frame(requests)
    vocabulary = Vocabulary([piece.encode("latin-1") for piece in first["tokens"]], first["eos"], first["special"])
    tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=first["eos"])
    write_frame(answers, {"ready": True})

    def serve() -> None:
        while (request := read_frame(requests)) is not None:
            write_frame(answers, {"error": attempt(tokenizer, request["grammar"])})

    threading.stack_size(STACK)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
