"""Adapters as checkpoints: the same folders as models have, there whole or not at all."""

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from realm_jax.checkpoint.manifest import ADAPTER
from realm_jax.errors import CheckpointError
from realm_jax.gguf.file import display_path
from realm_jax.lora.adapter import DTYPES, FLOAT32_MAX, Adapter, Builder, Place, name_of

_NAME = re.compile(r"(?:blk\.([0-9]{1,6})\.)?([a-z0-9_]+\.weight)")


def write_checkpoint(adapter: Adapter, folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes an adapter, its values as they are. CheckpointError: see save_state."""
    from realm_jax.checkpoint import save_state  # imports Orbax, which takes a second or two

    arrays, scales = {}, {}
    for place, pair in adapter.pairs.items():
        name = name_of(place)
        arrays[f"{name}.a"], arrays[f"{name}.b"], scales[name] = pair.a, pair.b, pair.scale
    save_state(folder, ADAPTER, arrays, {"architecture": adapter.architecture, "scales": scales}, force=force)


def read_checkpoint(
    folder: str | os.PathLike[str], architecture: str, shapes: Mapping[Place, tuple[int, ...]]
) -> Adapter:
    """Reads an adapter for a base model of this architecture and these matrices. AdapterError: see read_adapter."""
    from realm_jax.checkpoint import load_state

    label = display_path(Path(folder))
    builder = Builder(label, architecture, shapes)
    try:
        arrays, facts = load_state(folder, ADAPTER)
    except CheckpointError as error:
        raise builder.fail(str(error)) from error
    if facts.get("architecture") != architecture:
        raise builder.fail(
            f"it was made for architecture {str(facts.get('architecture'))[:40]!r}, and the model's is {architecture!r}"
        )
    scales: Any = facts.get("scales")
    if not isinstance(scales, dict) or set(arrays) != {f"{name}.{half}" for name in scales for half in "ab"}:
        raise builder.fail("its matrices and its scales are not of the same tensors")
    for name, scale in scales.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise builder.fail(f"{name[:80]!r} is no name of a matrix")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= FLOAT32_MAX:
            raise builder.fail(f"{name}: its scale is {str(scale)[:40]}; a float32 is accepted")
        layer, role = match.groups()
        place = (role, None if layer is None else int(layer))
        a, b = arrays[f"{name}.a"], arrays[f"{name}.b"]
        if a.dtype not in DTYPES or b.dtype not in DTYPES:
            raise builder.fail(f"{name}: matrices of {a.dtype} and {b.dtype}; floats are accepted")
        builder.check_place(place, f"tensor {name}")
        # Of the embedding, a pair's A lies as its rows are looked up: [K, r].
        builder.check_pair(place, a.shape, b.shape)
        builder.add(place, scale, partial(arrays.__getitem__, f"{name}.a"), partial(arrays.__getitem__, f"{name}.b"))
    return builder.build()
