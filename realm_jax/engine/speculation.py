"""Speculation on the host: which tokens to guess, how many, and how many of them were right. No model, no device.

A round verifies k drafts by k + 1 rows of one batch and keeps the drafts that equal what the target drew in their place
(`accepted`), and one token more. As draft and target draw with the same noise, the output is that of no speculation.
"""

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# What `speculate=True` means: at most so many drafts in a round.
DEFAULT_DRAFTS = 7

# Adaptive's accounts are in tokens: what one plain step brings. What may be lost in all, and on probes, a step.
_INITIAL = 2.0
_PROBING = 0.02
# Rounds are forgotten at this rate; the estimate starts as if _PRIOR had been seen: (drafts accepted, drafts tried).
_KEPT = 0.9
_PRIOR = (1.5, 2.0)
# What speculation must gain by the estimate to be used.
_WORTHWHILE = 1.01
# Batches of a size that must be measured, and how many batches later they are forgotten.
_ENOUGH = 3
_RECENT = 2000
# Prompts are indexed no further back than this, which bounds memory and the time of the first look-up.
_INDEXED = 1 << 15


def accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of the drafts are kept: those before the first that differs from what the target drew in its place.

    drawn: the target's tokens at the drafts' positions, and possibly at more. The round's output is
    drawn[: accepted + 1].
    """
    for i, (draft, token) in enumerate(zip(drafts, drawn)):
        if draft != token:
            return i
    return min(len(drafts), len(drawn))


class NGram:
    """Prompt lookup (Saxena, 2023): guesses that what followed the last few tokens before will follow them again.

    Keeps, of each n-gram of min_n to max_n tokens, where it was last continued: constant work per token.
    """

    def __init__(self, max_n: int = 4, min_n: int = 2):
        if not 1 <= min_n <= max_n:
            raise ValueError(f"n-grams of {min_n} to {max_n} tokens; accepted: 1 <= min_n <= max_n")
        self._sizes = range(max_n, min_n - 1, -1)
        self._continued: dict[bytes, int] = {}  # n-gram -> position of the token after its last occurrence
        self._indexed = 0  # n-grams that end before this position are in it, if they are continued

    def update(self, tokens: np.ndarray) -> None:
        """Takes in the tokens int32 that came since the last call; those before must be the same."""
        last = len(tokens) - 1  # an n-gram that ends there is not continued yet
        start = max(self._indexed, last - _INDEXED)
        if start >= last:
            return
        base = max(start - self._sizes[0] + 1, 0)
        raw = np.ascontiguousarray(tokens[base:last], np.int32).tobytes()
        for end in range(start + 1, last + 1):  # tokens[end] continues the n-grams before it
            for n in self._sizes:
                if end - n >= base:
                    self._continued[raw[4 * (end - n - base) : 4 * (end - base)]] = end
        self._indexed = last

    def propose(self, tokens: np.ndarray, k: int) -> list[int]:
        """k tokens that may follow tokens int32 [T], the request's prompt and output so far; [] if nothing repeats.

        They continue the last earlier occurrence of the longest n-gram at the end; past the end of the text they go on
        with themselves, so that a period is carried on.
        """
        self.update(tokens)
        length = len(tokens)
        for n in self._sizes:
            at = (
                self._continued.get(np.ascontiguousarray(tokens[length - n :], np.int32).tobytes())
                if n < length
                else None
            )
            if at is not None:
                period = length - at
                return [int(tokens[at + i % period]) for i in range(k)]
        return []


class StepCosts:
    """Seconds that a batch takes, measured, by the bucket its rows are padded to. One for all requests of an engine.

    A size counts as measured after _ENOUGH batches, so that one that was held up does not decide, and only while these
    are among the last _RECENT ones: what once looked too dear to try is tried again some day.
    """

    def __init__(self, bucket: Callable[[int], int]):
        """bucket: from a number of rows to the number they are padded to."""
        self._bucket = bucket
        self._observed = 0
        self._samples: dict[int, deque[tuple[int, float]]] = {}  # by bucket: when, in batches, and seconds
        self._medians: dict[int, float] = {}  # of those that are measured

    def observe(self, rows: int, seconds: float) -> None:
        """A batch of so many decode rows took so long. Batches that compiled, or held prompts, tell nothing here."""
        self._observed += 1
        bucket = self._bucket(rows)
        samples = self._samples.setdefault(bucket, deque(maxlen=15))
        samples.append((self._observed, seconds))
        if len(samples) >= _ENOUGH:
            self._medians[bucket] = statistics.median(taken for _, taken in samples)
        for size in [size for size, known in self._samples.items() if known[-1][0] <= self._observed - _RECENT]:
            del self._samples[size]
            self._medians.pop(size, None)

    def measured(self, rows: int) -> bool:
        """Whether batches of so many rows are measured."""
        return self._bucket(rows) in self._medians

    def seconds(self, rows: int) -> float | None:
        """Of a batch of so many rows; between measured sizes by interpolation. None while nothing is measured.

        Beyond the measured sizes it is the nearest one's, which favours trying, and so measuring, what is not known.
        """
        if not self._medians:
            return None
        known = sorted(self._medians)
        return float(np.interp(self._bucket(rows), known, [self._medians[size] for size in known]))


class Adaptive:
    """How many drafts a request's next round should have: what pays, by measured acceptance and measured costs.

    With a the chance that a draft is right if those before it were, k drafts bring (1 - a^(k+1)) / (1 - a) tokens
    (Leviathan et al., 2023, arXiv:2211.17192). They make the batch k rows larger and cost k steps of the draft model;
    the k with the most tokens per second for the whole batch is taken, 0 if that is it.

    What guesses may cost is accounted, in tokens of plain decoding: a round is started only if the account covers its
    loss should nothing be accepted. The account gains 2 % of a token with each step and what a round gained, and is
    bounded. So, as far as the measured costs are right, speculation never costs more than 2 tokens and 2 % of a
    request, whatever its acceptance. When it does not pay, it is tried again as often as a second account of 2 %
    allows, and at once after a trial that gained.
    """

    def __init__(self, max_drafts: int, costs: StepCosts):
        """max_drafts: most drafts in a round; 0 turns speculation off."""
        self._max = max_drafts
        self._costs = costs
        self._accepted, self._tried = _PRIOR
        self._account = _INITIAL
        self._probes = 0.0  # the account of rounds that do not pay by the estimate
        self._probing = False
        self._prices: list[float] = []  # of a round of 0, 1, 2, ... drafts, in tokens: as of the last choice

    @property
    def acceptance(self) -> float:
        """The present estimate of a, 0 to 1."""
        return self._accepted / self._tried

    def choose(self, others: int, draft_seconds: float | None = 0.0) -> int:
        """How many drafts to verify in the next step, 0 to max_drafts. Call it once for every step of the request.

        Args:
          others: rows that the batch has besides this request's first one.
          draft_seconds: what each draft costs; 0 for n-gram lookup, None for what is not known yet.
        """
        self._account, self._probes = self._booked(self._account, _PROBING), self._booked(self._probes, _PROBING)
        self._probing = False
        plain = self._costs.seconds(others + 1)
        if not plain or not self._costs.measured(others + 1):
            return 0  # steps without drafts tell what there is to gain
        if draft_seconds is None:
            self._prices = [0.0] * (self._max + 1)
            return min(1, self._max)
        token = plain / (others + 1)  # the batch's seconds per token without drafts
        self._prices = [0.0]
        for k in range(1, self._max + 1):
            seconds = self._costs.seconds(others + 1 + k)
            assert seconds is not None
            self._prices.append(max(seconds + k * draft_seconds - plain, 0.0) / token)
        affordable = [
            k
            for k in range(1, self._max + 1)
            # Not what would not pay even if every draft were right.
            if self._prices[k] <= self._account and self._gain(k, others, 1.0) > _WORTHWHILE
        ]
        if not affordable:
            return 0
        best = max(affordable, key=lambda k: self._gain(k, others, self.acceptance))
        if self._gain(best, others, self.acceptance) > _WORTHWHILE:
            return best
        # Of the cheapest the longest.
        trial = min(affordable, key=lambda k: (self._prices[k], -k))
        self._probing = self._prices[trial] <= self._probes
        return trial if self._probing else 0

    def observe(self, drafted: int, kept: int) -> None:
        """Of the last step's drafts, at most as many as were chosen, so many were kept. 0 of 0 if there were none."""
        if not drafted:
            return
        self._accepted = _KEPT * self._accepted + kept
        self._tried = _KEPT * self._tried + kept + (kept < drafted)
        gained = kept - self._prices[drafted]
        self._account = self._booked(self._account, gained)
        if self._probing:
            self._probes = self._booked(self._probes, gained)

    def _booked(self, account: float, gained: float) -> float:
        # A gain of long ago must not pay for losses without end.
        return min(account + gained, self._max + 1.0)

    def _gain(self, k: int, others: int, acceptance: float) -> float:
        """The batch's tokens per second with k drafts over those without."""
        expected = sum(acceptance**i for i in range(k + 1))
        return (others + expected) / (others + 1 + self._prices[k])


@dataclass
class SpeculationStats:
    """What speculation did for a request.

    Attributes:
      rounds: steps that verified drafts.
      drafted, accepted: drafts in them, and those that were kept.
      tried: drafts of which it was decided whether they are right: those kept and the first wrong one of each round.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tried: int = 0

    def add(self, drafted: int, kept: int) -> None:
        """A round; one without drafts is none."""
        if drafted:
            self.rounds += 1
            self.drafted += drafted
            self.accepted += kept
            self.tried += kept + (kept < drafted)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafts that was kept; None where there were none."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance(self) -> float | None:
        """The chance that a draft is right if those before it are: a of Adaptive's formula. None without drafts."""
        return self.accepted / self.tried if self.tried else None
