"""Writing for people, terminals and programs: one-line texts, safe text, JSON, sizes, and reading text files."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

from realm_jax.errors import InvalidRequestError

MAX_TEXT = 1 << 26  # bytes read from a file or pipe: some never end

_line_is_open = False  # is there generated text on the terminal's last line?


def one_line(text: str) -> str:
    """`text` on one line, without control characters: file content may be quoted in it."""
    return printable(" ".join(text.split()))


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters and lone surrogates, except those in `keep`, as visible escapes.

    Names and metadata come from files anybody may have written, and a terminal obeys what it is sent.
    """
    return "".join(c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_text(text: str) -> None:
    """Write generated text at once; to a terminal without control characters other than line breaks and tabs."""
    global _line_is_open
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))
        _line_is_open = not text.endswith("\n") if text else _line_is_open
    sys.stdout.write(text)
    sys.stdout.flush()


def line_is_open() -> bool:
    """Would a progress bar or a message stand on the terminal line where generated text just ended?"""
    return _line_is_open


def finish_line() -> None:
    """Start a new line on the terminal where generated text left one open."""
    if _line_is_open:
        write_text("\n")


def write_json(value: Any) -> None:
    """Print exactly one JSON object: a dataclass's fields, or a dict."""
    fields = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    print(json.dumps(fields, allow_nan=False, indent=None))


def write_table(rows: list[list[str]]) -> None:
    """Print rows in columns, left-aligned; the last column is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths)]
        print("  ".join([*cells, row[-1]]).rstrip())


def size(count: int | None) -> str:
    """A number of bytes as people read it; "?" where it is not known."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def read_text(source: str) -> str:
    """The text of a file, or of the standard input for "-".

    Raises:
        InvalidRequestError: it cannot be read, has more than MAX_TEXT bytes, or is no UTF-8.
    """
    shown = "standard input" if source == "-" else source
    try:
        if source == "-":
            data = sys.stdin.buffer.read(MAX_TEXT + 1)
        else:
            with open(source, "rb") as file:
                data = file.read(MAX_TEXT + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InvalidRequestError(f"cannot read {shown}: {reason}") from error
    if len(data) > MAX_TEXT:
        raise InvalidRequestError(f"{shown} has more than the {MAX_TEXT:,} bytes a text may have")
    return _decoded(data, shown)


def read_lines() -> Iterator[str]:
    """The lines of the standard input, each as soon as it is there.

    Raises:
        InvalidRequestError: one is no UTF-8. One of more than MAX_TEXT bytes is cut into several.
    """
    for number, line in enumerate(iter(lambda: sys.stdin.buffer.readline(MAX_TEXT), b""), 1):
        yield _decoded(line, f"line {number} of standard input").rstrip("\r\n")


def _decoded(data: bytes, shown: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{shown} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error
