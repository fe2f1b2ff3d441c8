"""Named arrays and facts about them in a folder: the state of a training, and adapters."""

import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from realm_jax.checkpoint.arrays import check_sums, restore_host, save_item
from realm_jax.checkpoint.folder import new_folder, require_space
from realm_jax.checkpoint.manifest import checked_target, is_checkpoint, read_manifest, write_manifest

_ITEM = "state"
_DTYPES = {np.dtype(t).name: np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.int32)}


def save_state(
    directory: str | os.PathLike[str],
    kind: str,
    arrays: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    force: bool = False,
) -> None:
    """Writes arrays with what JSON can say of them, in one step.

    Args:
        directory: a new folder, an empty one, or, with force, one that holds a checkpoint.
        kind: what it is: a constant of checkpoint.manifest.
        arrays: by name, on the host or a device.
        facts: of JSON's types.

    Raises:
        CheckpointError: there is something at `directory`, or it cannot be written.
    """
    target = checked_target(directory, force=force)
    host = {name: np.asarray(array) for name, array in arrays.items()}
    require_space(target, sum(array.nbytes for array in host.values()))
    listed = {name: [array.dtype.name, list(array.shape)] for name, array in host.items()}
    with new_folder(target, replaces=lambda found: force and is_checkpoint(found)) as folder:
        sums = {_ITEM: save_item(folder / _ITEM, host, {})}
        write_manifest(folder, kind, sums, {"facts": dict(facts), "arrays": listed})


def load_state(directory: str | os.PathLike[str], kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and facts that save_state wrote.

    Raises:
        CheckpointError: there is none, it is damaged, of another kind, or written by a newer version.
    """
    manifest = read_manifest(directory, kind)
    listed, facts = manifest.content.get("arrays"), manifest.content.get("facts")
    if not isinstance(listed, dict) or not isinstance(facts, dict):
        raise manifest.damaged("it lists no arrays")
    specs = {}
    for name, entry in listed.items():
        match entry:
            case [str(dtype), [*shape]] if dtype in _DTYPES and all(type(n) is int and n > 0 for n in shape):
                specs[name] = (tuple(shape), _DTYPES[dtype])
            case _:
                raise manifest.damaged(f"it lists an array {name[:80]!r} as {str(entry)[:80]}")
    arrays = restore_host(manifest, _ITEM, specs)
    for name, array in arrays.items():
        check_sums(manifest, _ITEM, name, array.shape, array, ())
    return arrays, facts
