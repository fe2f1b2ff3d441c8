"""What a host loop tells of itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoopStats:
    """What the loop has done and holds now.

    Attributes:
      steps: batches run. preemptions: requests that lost their slot for a while.
      running, waiting: requests.
      pages_total, pages_free, pages_cached: of the key/value cache; cached ones are held for their prefixes alone, too.
      prompt_tokens, reused_tokens, generated_tokens: computed, taken from the prefix cache instead, and drawn.
      drafted, accepted: tokens proposed by speculation, and those that the model confirmed.
      fairness_gap, fairness_bound: in virtual tokens, between tenants that wait (see engine.scheduler).
      adapters: names of those loaded.
    """

    steps: int
    preemptions: int
    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    drafted: int
    accepted: int
    fairness_gap: float
    fairness_bound: float
    adapters: tuple[str, ...]
