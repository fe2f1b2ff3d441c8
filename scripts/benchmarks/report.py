"""What every benchmark hands out: a table of figures beside their limit and their peer, and the same as JSON."""

import datetime
import json
import math
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "numpy", "llama-cpp-python", "torch", "transformers", "jax-cuda12-plugin")


@dataclass
class Row:
    """One figure.

    name: what was measured. unit: of figure, limit and peer. limit: what the hardware, or a bar, allows. peer: the
    same figure of somebody else, who peer_name says. higher: is more better? problem: why there is no figure.
    rate: the figure said in another way, for reading. ok: False where the figure misses a limit that is a bar.
    """

    name: str
    figure: float | None
    unit: str
    limit: float | None = None
    peer: float | None = None
    peer_name: str = ""
    higher: bool = True
    rate: str = ""
    problem: str = ""
    ok: bool = True
    samples: list[float] = field(default_factory=list)
    peer_samples: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer."""
        return self._better(self.figure, self.peer)

    @property
    def of_limit(self) -> float | None:
        """Which part of the limit is reached; 1 is all of it, either way round."""
        return None if self.unit == "NMSE" else self._better(self.figure, self.limit)

    def _better(self, figure: float | None, other: float | None) -> float | None:
        if not figure or not other:
            return None
        return figure / other if self.higher else other / figure

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "of_limit": self.of_limit}


def row_from(entry: dict[str, Any]) -> Row:
    """The inverse of Row.as_dict."""
    return Row(**{key: value for key, value in entry.items() if key not in ("ratio", "of_limit")})


def number(value: float | None) -> str:
    """Three digits that count, at least."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def table(rows: Sequence[Row]) -> str:
    """Markdown, columns padded so that it also reads well as it is."""
    head = ("", "figure", "limit", "of limit", "peer", "ratio", "")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    if row.figure is None:
        return (row.name, "-", "", "", number(row.peer) if row.peer is not None else "", "", row.problem)
    part = "" if row.of_limit is None else f"{row.of_limit:.0%}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    peer = "" if row.peer is None else f"{number(row.peer)} {row.peer_name}".rstrip()
    limit = "" if row.limit is None else number(row.limit)
    note = "; ".join(filter(None, (row.rate, row.problem, "" if row.ok else "MISSED")))
    return (row.name, f"{number(row.figure)} {row.unit}", limit, part, peer, ratio, note)


def versions() -> dict[str, str]:
    """Python and the packages that matter, where they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(
    path: str | Path | None, script: str, rows: Iterable[Row], machine: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The report as JSON; nothing when path is None."""
    if path is None:
        return
    document = {
        "script": script,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions(),
        "settings": settings,
        "rows": [row.as_dict() for row in rows],
    }
    Path(path).write_text(json.dumps(document, indent=1, allow_nan=True) + "\n")


def warn_if_busy(busy: float) -> None:
    """Says so where others took more than a tenth of the machine."""
    if busy > 0.1:
        print(f"OTHERS USED UP TO {busy:.0%} OF THIS MACHINE MEANWHILE: do not rely on these figures, nor on ratios.")


def note(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
