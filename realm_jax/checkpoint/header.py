"""A model's metadata, tokenizer and chat template as a GGUF file without tensors, which every reader of them takes."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.gguf.header import ALIGNMENT_KEY, MAGIC
from realm_jax.gguf.split import COUNT_KEY, NUMBER_KEY, TENSORS_KEY
from realm_jax.gguf.types import SCALAR_DTYPES, ValueType

HEADER_FILE = "header.gguf"

_VERSION = 3
_OF_THE_FILE = (ALIGNMENT_KEY, COUNT_KEY, NUMBER_KEY, TENSORS_KEY)  # keys that say where the file's tensors lie


def write_header(path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes metadata as GGUFFile.metadata gives it; integers and floats in their widest types, so no value changes."""
    kept = {key: value for key, value in metadata.items() if key not in _OF_THE_FILE}
    out = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, 0, len(kept)))
    for key, value in kept.items():
        out += _text(key)
        if isinstance(value, str):
            out += struct.pack("<I", ValueType.STRING) + _text(value)
        elif isinstance(value, list):
            out += struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(value))
            out += b"".join(map(_text, value))
        elif isinstance(value, np.ndarray):
            out += struct.pack("<IIQ", ValueType.ARRAY, _type_of(value.dtype), len(value)) + value.tobytes()
        elif isinstance(value, bool):
            out += struct.pack("<I?", ValueType.BOOL, value)
        elif isinstance(value, float):
            out += struct.pack("<Id", ValueType.FLOAT64, value)
        elif value < 0:
            out += struct.pack("<Iq", ValueType.INT64, value)
        else:
            out += struct.pack("<IQ", ValueType.UINT64, value)
    path.write_bytes(out)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _type_of(dtype: np.dtype) -> int:
    return next(kind for kind, name in SCALAR_DTYPES.items() if np.dtype(name) == dtype)
