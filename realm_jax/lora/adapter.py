"""An adapter as the host holds it: pairs of small matrices, checked against the base model they belong to."""

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import ml_dtypes
import numpy as np

from realm_jax.errors import AdapterError
from realm_jax.model.adapters import EMBEDDING, HEAD
from realm_jax.model.params import Model

MAX_RANK = 1024
FLOAT32_MAX = float(np.finfo(np.float32).max)
DTYPES = tuple(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))

Place = tuple[str, int | None]  # a role, and its layer, or None for what a model has once


def name_of(place: Place) -> str:
    """The base tensor's name in its file."""
    role, layer = place
    return role if layer is None else f"blk.{layer}.{role}"


@dataclass(frozen=True)
class Pair:
    """What is added to one matrix W [N, K]: scale * b @ a.

    a: [r, K], of one of DTYPES; of the embedding [K, r], its rows being looked up, where K counts the vocabulary and N
        is the hidden size: W^T gets scale * b @ a^T.
    b: [N, r].
    scale: alpha / r, or alpha / sqrt(r); a float32.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(np.float32(self.scale)))

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True)
class Adapter:
    """The content of one adapter, whatever it is called and however it was stored.

    architecture: of the base model. pairs: by place, sorted. source: the file or folder it was read from, "" for none.
    """

    architecture: str
    pairs: Mapping[Place, Pair]
    source: str = ""

    @property
    def roles(self) -> frozenset[str]:
        return frozenset(role for role, _ in self.pairs)

    @property
    def rank(self) -> int:
        """The largest of all pairs."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def nbytes(self) -> int:
        return sum(pair.nbytes for pair in self.pairs.values())

    @cached_property
    def content_hash(self) -> bytes:
        """BLAKE2b, 32 bytes, of places, shapes, values and scales: equal where these are, in any file."""
        digest = hashlib.blake2b(digest_size=32)
        digest.update(self.architecture.encode())
        for place, pair in self.pairs.items():
            name = name_of(place).encode()
            digest.update(struct.pack("<Qd", len(name), pair.scale) + name)
            for matrix in (pair.a, pair.b):
                digest.update(struct.pack("<QQ", *matrix.shape))
                digest.update(np.ascontiguousarray(matrix, np.float32).tobytes())
        return digest.digest()


def weight_shapes(model: Model) -> dict[Place, tuple[int, ...]]:
    """The shapes of the matrices of a model, and of the head a tied model could have of its own."""
    tables, stacks = model.params.tables, model.params.stacks
    embedding = model.whole_shape(EMBEDDING, tables[EMBEDDING])
    shapes: dict[Place, tuple[int, ...]] = {(EMBEDDING, None): embedding, (HEAD, None): embedding}
    for layer, row in enumerate(model.plan.layers):
        for role, stack, _ in row:
            if stack in stacks:
                shapes[role, layer] = model.whole_shape(role, stacks[stack])[1:]
    return shapes


class Builder:
    """Collects the matrices of one file, holding every one to the base model before its values are read."""

    def __init__(self, label: str, architecture: str, shapes: Mapping[Place, tuple[int, ...]]) -> None:
        """label: the adapter's name in messages; shapes: as of weight_shapes."""
        self._label = label
        self._architecture = architecture
        self._shapes = shapes
        self._pairs: dict[Place, Pair] = {}

    def fail(self, problem: str) -> AdapterError:
        return AdapterError(f"adapter {self._label}: {problem}")

    def check_place(self, place: Place, tensor: str) -> None:
        """Raises AdapterError when the base model has no such matrix, or it takes no adapter."""
        shape = self._shapes.get(place)
        if shape is None:
            raise self.fail(
                f"{tensor} is for {name_of(place)}, which the base model ({self._architecture}) does not have; "
                "an adapter of this very model is accepted"
            )
        if len(shape) != 2:
            raise self.fail(
                f"{tensor} is for {name_of(place)}, a stack of experts' or heads' matrices; adapters of plain linear "
                "layers, the embedding and the head are accepted"
            )

    def check_pair(self, place: Place, a: tuple[int, ...], b: tuple[int, ...]) -> int:
        """The rank of a pair of these shapes. Raises AdapterError when they do not fit each other or the base model."""
        name = name_of(place)
        n, k = self._shapes[place]
        if place[0] == EMBEDDING:
            n, k = k, n
            a = a[::-1]
        if len(a) != 2 or len(b) != 2:
            raise self.fail(f"{name}: matrices of shapes {a} and {b}; two axes each are accepted")
        if a[0] != b[1]:
            raise self.fail(f"{name}: A has rank {a[0]} and B rank {b[1]}; they must be equal")
        if not 1 <= a[0] <= MAX_RANK:
            raise self.fail(f"{name}: the rank is {a[0]}; 1 to {MAX_RANK} are accepted")
        if (b[0], a[1]) != (n, k):
            raise self.fail(
                f"{name}: an adapter from {a[1]} to {b[0]} elements, but the base model's matrix goes from {k} to {n}: "
                "it was made for another model"
            )
        return a[0]

    def add(
        self, place: Place, scale: float, read_a: Callable[[], np.ndarray], read_b: Callable[[], np.ndarray]
    ) -> None:
        """Reads a pair whose shapes have been checked. Raises AdapterError for values that are not finite."""
        name = name_of(place)
        a, b = read_a(), read_b()
        for which, matrix in (("A", a), ("B", b)):
            if not np.isfinite(matrix).all():
                raise self.fail(f"{name}: {which} holds values that are not finite")
        if not math.isfinite(scale) or abs(scale) > FLOAT32_MAX:
            raise self.fail(f"{name}: its scale is {scale:g}; a float32 is accepted")
        self._pairs[place] = Pair(a, b, scale)

    def build(self) -> Adapter:
        if not self._pairs:
            raise self.fail("it holds no matrices; at least one pair is accepted")
        ordered = dict(sorted(self._pairs.items(), key=lambda item: name_of(item[0])))
        return Adapter(self._architecture, MappingProxyType(ordered))


def permuted_rows(b: np.ndarray, heads: int, *, undo: bool = False) -> np.ndarray:
    """The rows of a query or key projection, from Hugging Face's order (the halves of a head's rotation apart) to that
    of GGUF files of architectures that rotate neighbours (pairs together), or back."""
    half = b.shape[0] // heads // 2
    split = (heads, half, 2) if undo else (heads, 2, half)
    return np.ascontiguousarray(b.reshape(*split, -1).swapaxes(1, 2).reshape(b.shape))
