"""What a GGUF file holds, as plain data for printing."""

import math
from typing import Any

import numpy as np

LONGEST_ARRAY = 16  # longer arrays are shown by their beginning


def describe(file: Any) -> dict[str, Any]:
    """A JSON-able description of an open GGUFFile, or CheckpointFile: what it is, its metadata, its tensors.

    Keys: format ("gguf" or "checkpoint"), path, parts, version, size (bytes of all parts), architecture and name (None
    where the file does not say), parameters (elements of all tensors), tensor_count, types ({type: {"tensors": n,
    "bytes": n}}, the largest first), metadata ({key: value}; an array longer than LONGEST_ARRAY as {"type", "length",
    "first"}), tensors (a list of {"name", "shape", "type", "bytes"} in file order, shapes outermost dimension first).
    Bytes that are no UTF-8 appear as U+FFFD, floats that are not finite as strings.
    """
    types: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        entry = types.setdefault(tensor.type.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return {
        "format": file.format,
        "path": _text(str(file.path)),
        "parts": [_text(str(part)) for part in file.parts],
        "version": file.version,
        "size": file.nbytes,
        "architecture": _string(file.metadata.get("general.architecture")),
        "name": _string(file.metadata.get("general.name")),
        "parameters": sum(tensor.elements for tensor in file.tensors.values()),
        "tensor_count": len(file.tensors),
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
        "metadata": {key: _value(value) for key, value in file.metadata.items()},
        "tensors": [
            {"name": tensor.name, "shape": list(tensor.shape), "type": tensor.type.name, "bytes": tensor.nbytes}
            for tensor in file.tensors.values()
        ],
    }


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | np.ndarray):
        kind = value.dtype.name if isinstance(value, np.ndarray) else "str"
        items = value[:LONGEST_ARRAY]
        shown = [_value(item) for item in (items.tolist() if isinstance(items, np.ndarray) else items)]
        return shown if len(value) <= LONGEST_ARRAY else {"type": kind, "length": len(value), "first": shown}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _string(value: Any) -> str | None:
    return _text(value) if isinstance(value, str) else None


def _text(text: str) -> str:
    """The text with every byte that is no UTF-8 replaced by U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
