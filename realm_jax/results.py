"""What a request returns. Plain frozen dataclasses: `dataclasses.asdict` of a Result is JSON."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of probabilities at one generated position, under the model's own distribution.

    They are the log-softmax of the raw logits, before penalties, bias, temperature and truncation.

    Attributes:
      token: the token that was chosen.
      logprob: its log probability.
      top: (token, log probability) of the most likely tokens, best first; as many as SamplingParams.logprobs.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Usage:
    """Counts of tokens: in the prompt, generated (the one that ended the generation included), and together.

    cached_tokens: of the prompt, those whose keys and values were in the prefix cache and were not computed.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Speculation:
    """What speculation did for a request.

    Attributes:
      rounds: steps that verified drafts.
      drafted: tokens proposed in them; accepted: those of them that the model itself drew.
      acceptance: the chance that a draft is accepted if those before it were; None where there were none.
    """

    rounds: int
    drafted: int
    accepted: int
    acceptance: float | None


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one request, as the host loop saw them.

    Attributes:
      queue: from submission to admission into the batch.
      prefill: from admission to the first token.
      time_to_first_token: from submission to the first token (queue + prefill).
      decode: from the first token to the last.
      total: from submission to the end.
      decode_tokens_per_second: tokens after the first over `decode`; None with fewer than two tokens.
    """

    queue: float
    prefill: float
    time_to_first_token: float
    decode: float
    total: float
    decode_tokens_per_second: float | None


@dataclass(frozen=True)
class Result:
    """One finished request.

    Attributes:
      text: the generated text, special tokens and whatever follows a stop string left out.
      tokens: every generated token id, the one that ended the generation included.
      finish_reason: "stop" (end-of-generation token, stop token or stop string, or a grammar's end), "length"
        (max_tokens or a full context), "cancelled" or "deadline".
      logprobs: one entry per token, or None when SamplingParams.logprobs is None.
      usage, timing: of this completion alone.
      speculation: None where it was not asked for.
      choices: all n completions, this one first, when SamplingParams.n > 1; else empty.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    usage: Usage
    timing: Timing
    speculation: Speculation | None = None
    choices: list["Result"] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """A step of a streamed request.

    Attributes:
      text: text that is final: never half a character, never part of a stop string. It may be empty.
      tokens: the token ids sampled since the last piece.
      logprobs: one entry per token in `tokens`, or None.
      finish_reason, usage, timing, speculation: None before the last piece.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    speculation: Speculation | None = None
