"""Typed, bounded access to a file's metadata, which remembers what nobody asked for."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from realm_jax.errors import GGUFError, UnsupportedModelError
from realm_jax.gguf.header import quote

_MISSING = object()

MAX_INTEGER = (1 << 31) - 1  # what an int32 on the device holds


class MetadataReader:
    """Reads the keys below one architecture's prefix. Wrong types and values out of range are refused by name."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        self._metadata = metadata
        self._prefix = architecture + "."
        self._read: set[str] = set()

    def _get(self, key: str, default: Any) -> Any:
        name = self._prefix + key
        self._read.add(name)
        value = self._metadata.get(name, default)
        if value is _MISSING:
            raise GGUFError(f"metadata key {name} is missing; the architecture requires it")
        return value

    def integer(self, key: str, default: Any = _MISSING, *, low: int = 0, high: int = MAX_INTEGER) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise GGUFError(f"metadata key {self._prefix}{key} is {_brief(value)}; it must be an integer")
        if not low <= value <= high:
            raise GGUFError(f"metadata key {self._prefix}{key} is {value}; it must be from {low} to {high}")
        return int(value)

    def per_layer(
        self, key: str, layers: int, default: Any = _MISSING, *, low: int = 0, high: int = MAX_INTEGER
    ) -> int:
        """An integer that files may also give as an array, one a layer; Realm takes it only when all are equal."""
        value = self._get(key, default)
        if isinstance(value, (list, np.ndarray)):
            distinct = sorted({int(v) for v in value if isinstance(v, (int, np.integer))})
            if len(value) < layers or len(distinct) != 1:
                raise UnsupportedModelError(
                    f"metadata key {self._prefix}{key} is {_brief(np.asarray(value).tolist())}; "
                    f"Realm needs the same integer for all {layers} layers"
                )
            if not low <= distinct[0] <= high:
                raise GGUFError(f"metadata key {self._prefix}{key} is {distinct[0]}; it must be from {low} to {high}")
            return distinct[0]
        return self.integer(key, default, low=low, high=high)

    def number(self, key: str, default: Any = _MISSING, *, low: float = -3.4e38, high: float = 3.4e38) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise GGUFError(f"metadata key {self._prefix}{key} is {_brief(value)}; it must be a number")
        if not math.isfinite(value) or not low <= value <= high:
            raise GGUFError(f"metadata key {self._prefix}{key} is {value}; it must be from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        value = self._get(key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise GGUFError(f"metadata key {self._prefix}{key} is {_brief(value)}; it must be true or false")
        return bool(value)

    def string(self, key: str, default: Any = _MISSING) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise GGUFError(f"metadata key {self._prefix}{key} is {_brief(value)}; it must be a string")
        return value

    def raw(self, key: str, default: Any = None) -> Any:
        return self._get(key, default)

    def refuse_unread(self) -> None:
        """A key under the architecture's prefix that nothing read may change what the model computes: refuse it."""
        for name in self._metadata:
            if name.startswith(self._prefix) and name not in self._read:
                raise UnsupportedModelError(
                    f"metadata key {quote(name)} = {_brief(self._metadata[name])} is unknown for this architecture; "
                    "ignoring it could change the model's output"
                )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
