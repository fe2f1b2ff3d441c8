"""Who proposes drafts, and how many: n-gram lookup or a draft model, adapted for each request."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from realm_jax.engine.speculation import Adaptive, NGram, SpeculationStats, StepCosts
from realm_jax.results import Speculation
from realm_jax.sampling import MAX_DRAFTS

if TYPE_CHECKING:
    from realm_jax.engine.request import Request

# A request whose drafts do not pay is left alone for so many steps, and one where look-up has found nothing so often in
# a row for fewer: the host then runs ahead of it again.
_PAUSE = 16
_MISSES, _SHORT_PAUSE = 8, 8


class RequestSpeculation:
    """Speculation of one request: how many drafts, where n-grams were, and what came of it."""

    def __init__(self, max_drafts: int, costs: StepCosts):
        self.ngram = NGram()
        self.stats = SpeculationStats()
        self._adaptive = Adaptive(max_drafts, costs)
        self._pause = 0
        self._misses = 0

    @property
    def active(self) -> bool:
        """Whether it may draft in the next step."""
        return self._pause == 0

    def choose(self, others: int, draft_seconds: float | None) -> int:
        """How many drafts to make now; see Adaptive."""
        if self._pause:
            self.rest()
            return 0
        k = self._adaptive.choose(others, draft_seconds)
        if k == 0:
            self._pause = _PAUSE
        return k

    def rest(self) -> None:
        """Counts a step without drafts."""
        self._pause = max(0, self._pause - 1)

    def looked_up(self, found: bool) -> None:
        """Notes whether there was anything to propose."""
        self._misses = 0 if found else self._misses + 1
        if self._misses >= _MISSES:
            self._misses, self._pause = _MISSES - 1, _SHORT_PAUSE

    def observe(self, drafted: int, accepted: int) -> None:
        self.stats.add(drafted, accepted)
        self._adaptive.observe(drafted, accepted)

    def result(self) -> Speculation:
        s = self.stats
        return Speculation(s.rounds, s.drafted, s.accepted, s.acceptance)


class Drafting(Protocol):
    """A draft model; see realm_jax.engine.draft."""

    @property
    def seconds(self) -> float | None: ...

    def propose(self, wanted: "list[tuple[Request, int]]") -> list[list[int]]: ...

    def release(self, request: "Request") -> None: ...

    def reset(self) -> None: ...


class Speculator:
    """Proposes drafts for the requests of a batch."""

    def __init__(self, bucket: Callable[[int], int], most_rows: int, draft: Drafting | None = None):
        """
        Args:
          bucket: from rows of a batch to the rows it is padded to.
          most_rows: of a batch, drafts included.
          draft: None: n-gram lookup.
        """
        self.costs = StepCosts(bucket)
        self._most_rows = most_rows
        self._draft = draft

    def start(self, max_drafts: int) -> RequestSpeculation:
        """For a new request."""
        return RequestSpeculation(min(max_drafts, MAX_DRAFTS), self.costs)

    def propose(self, requests: "list[Request]", rows: int) -> dict[str, tuple[int, ...]]:
        """Drafts by request id, for requests of a batch that has `rows` rows without any."""
        wanted: list[tuple[Request, int]] = []
        seconds = 0.0 if self._draft is None else self._draft.seconds
        for request in requests:
            assert request.speculation is not None
            room = min(self._most_rows - rows, request.limit - request.length - 1)
            k = min(request.speculation.choose(rows - 1, seconds), room)
            if k > 0:
                wanted.append((request, k))
                rows += k
        if not wanted:
            return {}
        if self._draft is not None:
            proposed = self._draft.propose(wanted)
        else:
            proposed = [_looked_up(request, k) for request, k in wanted]
        return {request.id: tuple(_allowed(request, drafts)) for (request, _), drafts in zip(wanted, proposed)}

    def release(self, request: "Request") -> None:
        """Forgets a request that has ended."""
        if self._draft is not None:
            self._draft.release(request)

    def reset(self) -> None:
        """After a failure on the device: everything that was cached there is lost."""
        if self._draft is not None:
            self._draft.reset()


def _looked_up(request: "Request", k: int) -> list[int]:
    assert request.speculation is not None
    drafts = request.speculation.ngram.propose(request.tokens[: request.length], k)
    request.speculation.looked_up(bool(drafts))
    return drafts


def _allowed(request: "Request", drafts: list[int]) -> list[int]:
    """Those of the drafts that the request's grammar allows, up to the first that it does not."""
    if request.grammar is None:
        return drafts
    try:
        return drafts[: request.grammar.valid(drafts)]
    except Exception as error:  # of its own making: its neighbours go on
        request.fail(error)
        return []
