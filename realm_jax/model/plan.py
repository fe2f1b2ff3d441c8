"""How the layers of a model are laid out for the scan: stacks, and runs of repeating layer signatures.

Weights of one role and one format are stacked over the layers that have them. A layer's signature is the set of stacks
it draws from. Real files mix formats (Q4_K_M interleaves two signatures), so the layers are cut into segments, each a
short period of signatures repeated many times: what is compiled is the sum of the periods, whatever the depth.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Layers start .. start + period * repeats - 1; layer start + i has the signature of layer start + i % period."""

    start: int
    period: int
    repeats: int


@dataclass(frozen=True)
class LayerPlan:
    """Static structure of the layers: which stack, and which place in it, serves each role of each layer."""

    segments: tuple[Segment, ...]
    # [num_layers] of ((role, stack name, index in the stack), ...), sorted by role
    layers: tuple[tuple[tuple[str, str, int], ...], ...]

    @property
    def bodies(self) -> int:
        """Layer bodies the compiler sees."""
        return sum(s.period for s in self.segments)


def plan_layers(stacks: Sequence[dict[str, str]]) -> LayerPlan:
    """Plans layers given, for each, the stack that serves each of its roles."""
    used: dict[str, int] = {}
    layers = []
    for roles in stacks:
        row = []
        for role, stack in sorted(roles.items()):
            row.append((role, stack, used.get(stack, 0)))
            used[stack] = used.get(stack, 0) + 1
        layers.append(tuple(row))
    signatures = [tuple((role, stack) for role, stack, _ in row) for row in layers]
    return LayerPlan(segments=find_segments(signatures), layers=tuple(layers))


def find_segments(signatures: Sequence[Hashable]) -> tuple[Segment, ...]:
    """Cuts a sequence into repeated periods so that the sum of the periods, then the number of segments, is least."""
    n = len(signatures)
    best: list[tuple[int, int]] = [(0, 0)] * (n + 1)  # (sum of periods, segments) of the layers from here on
    choice: list[tuple[int, int]] = [(1, 1)] * (n + 1)
    for start in range(n - 1, -1, -1):
        best[start] = (n + 1, n + 1)
        for period in range(1, n - start + 1):
            if period > best[start][0]:
                break  # a longer period alone already costs more
            end = start + period
            while True:
                cost = (period + best[end][0], 1 + best[end][1])
                if cost < best[start]:
                    best[start], choice[start] = cost, (period, (end - start) // period)
                following = end + period
                if following > n or any(signatures[i] != signatures[i - period] for i in range(end, following)):
                    break
                end = following
    segments, start = [], 0
    while start < n:
        period, repeats = choice[start]
        segments.append(Segment(start, period, repeats))
        start += period * repeats
    return tuple(segments)
