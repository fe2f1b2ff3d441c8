"""Merging an adapter into a model, for one who has the device to itself: W + scale * B A, packed again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import AdapterError, InvalidRequestError
from realm_jax.lora.adapter import Adapter, Pair, name_of, weight_shapes
from realm_jax.model.adapters import EMBEDDING, HEAD
from realm_jax.model.params import Model
from realm_jax.model.plan import LayerPlan, find_segments
from realm_jax.quant import QuantizedTensor, format_of, pack, packed_spec

Format = Literal["BF16", "Q8_0", "F32"]
FORMATS = ("BF16", "Q8_0", "F32")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    format: of the merged matrices. errors: for each, by its name, the NMSE of what is stored against float32
    W + scale * B A, sum((a - b)^2) / sum(a^2). bytes_before, bytes_after: of all weights.
    """

    format: str
    errors: Mapping[str, float]
    bytes_before: int
    bytes_after: int

    @property
    def worst(self) -> float:
        return max(self.errors.values())


def merge(model: Model, adapter: Adapter, format: Format = "BF16", scale: float = 1.0) -> tuple[Model, MergeReport]:
    """A model whose matrices hold an adapter, with no cost of its own at run time.

    Matrices are dequantized, changed and packed one by one; those the adapter does not touch are the model's own
    arrays. A tied head stays as it was when the embedding changes: adapters of embeddings mean the lookup alone.

    Args:
        model: the base, which stays as it is.
        adapter: read for this model.
        format: of the merged matrices: "BF16", "Q8_0" (1.06 bytes a value) or "F32".
        scale: of the adapter.

    Raises:
        InvalidRequestError: another format.
        AdapterError: the adapter is not this model's, or rows are no multiple of Q8_0's block of 32.
    """
    if format not in FORMATS:
        raise InvalidRequestError(f"format is {format!r}; accepted: {', '.join(FORMATS)}")
    shapes = weight_shapes(model)
    for place, pair in adapter.pairs.items():
        n, k = shapes.get(place, (0, 0))
        if place[0] == EMBEDDING:
            n, k = k, n
        a = pair.a.T if place[0] == EMBEDDING else pair.a
        if (pair.b.shape[0], a.shape[1]) != (n, k):
            raise AdapterError(f"{name_of(place)}: the adapter was made for another model")
        if shapes[place][1] % format_of(format).block:
            raise AdapterError(
                f"{name_of(place)} has rows of {shapes[place][1]} elements, no multiple of {format}'s block of "
                f"{format_of(format).block}; BF16 and F32 are accepted"
            )
    errors: dict[str, float] = {}
    tiled = model.backend == "native" and not format_of(format).dense

    tables = dict(model.params.tables)
    for role in (EMBEDDING, HEAD):
        if (role, None) not in adapter.pairs:
            continue
        pair = adapter.pairs[role, None]
        base = model.params.tables.get(role, model.params.tables[EMBEDDING])
        if role == EMBEDDING:
            tables.setdefault(HEAD, base)
        arrays = _empty(tuple(base.shape), format, tiled)
        errors[role] = _merge_into(arrays, base, pair, format, scale, tiled, transposed=role == EMBEDDING)
        tables[role] = _packed(arrays, format, base.shape[-2], tiled)

    stacks = dict(model.params.stacks)
    layers = [list(row) for row in model.plan.layers]
    for role in sorted(adapter.roles - {EMBEDDING, HEAD}):
        pairs = {layer: pair for (r, layer), pair in adapter.pairs.items() if r == role and layer is not None}
        name = f"{role}:{format}:merged"
        shape = shapes[role, next(iter(pairs))]
        arrays = _empty((len(pairs), *shape), format, tiled)
        for index, (layer, pair) in enumerate(sorted(pairs.items())):
            at = next(i for i, (r, _, _) in enumerate(layers[layer]) if r == role)
            _, stack, within = layers[layer][at]
            base = _matrix(model.params.stacks[stack], within)
            into = {key: array[index] for key, array in arrays.items()}
            errors[name_of((role, layer))] = _merge_into(into, base, pair, format, scale, tiled)
            layers[layer][at] = (role, name, index)
        stacks[name] = _packed(arrays, format, shape[0], tiled)
    used = {stack for row in layers for _, stack, _ in row}
    signatures = [tuple((role, stack) for role, stack, _ in row) for row in layers]
    merged = replace(
        model,
        params=replace(
            model.params, stacks={name: stack for name, stack in stacks.items() if name in used}, tables=tables
        ),
        plan=LayerPlan(find_segments(signatures), tuple(tuple(row) for row in layers)),
    )
    return merged, MergeReport(format, errors, model.nbytes, merged.nbytes)


def _matrix(stack: QuantizedTensor, index: int) -> QuantizedTensor:
    return replace(stack, arrays={key: array[index] for key, array in stack.arrays.items()})


def _merge_into(
    out: dict[str, np.ndarray],
    base: QuantizedTensor,
    pair: Pair,
    format: str,
    scale: float,
    tiled: bool,
    *,
    transposed: bool = False,
) -> float:
    """Packs one matrix plus its pair into arrays; the NMSE of what they hold."""
    exact = np.array(base.take_rows(jnp.arange(base.shape[-2])))  # float32 [N, K]
    a, b = pair.a.astype(np.float32), pair.b.astype(np.float32)
    exact += np.float32(pair.scale * scale) * (a @ b.T if transposed else b @ a)
    kind = gguf.GGMLQuantizationType[format]
    blocks = np.ascontiguousarray(gguf.quants.quantize(exact, kind))
    pack(blocks.view(np.uint8).reshape(-1), exact.shape, format, out=out, tiled=tiled)
    stored = gguf.quants.dequantize(blocks, kind).reshape(exact.shape)
    total = float(np.square(exact, dtype=np.float64).sum())
    return float(np.square(stored - exact, dtype=np.float64).sum()) / total if total else 0.0


def _empty(shape: tuple[int, ...], format: str, tiled: bool) -> dict[str, np.ndarray]:
    return {key: np.empty(s, d) for key, (s, d) in packed_spec(shape, format, tiled=tiled).items()}


def _packed(arrays: dict[str, Any], format: str, rows: int, tiled: bool) -> QuantizedTensor:
    return QuantizedTensor(arrays=jax.device_put(arrays), format=format, rows=rows if tiled else None)
