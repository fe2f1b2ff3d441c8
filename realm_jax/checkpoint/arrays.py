"""The items of a checkpoint: dicts of arrays, each written and restored by Orbax, with a checksum for every part.

Uncompressed: packed weights do not get smaller. Restored are whole arrays on the host, or shardings of them, and every
value that is restored is checked before it is used.
"""

import logging
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from realm_jax.checkpoint.manifest import Manifest
from realm_jax.errors import CheckpointError
from realm_jax.interrupt import interrupt_deferred

CHUNK_BYTES = 8 << 20  # at most, of the pieces an array is written in: what a reader holds twice

_MAX_THREADS = 8
_INLINE_BYTES = 4 << 20  # of an array's pieces, those of up to 1 kB are compressed in an index; there may be 48 * 48
_INDEX_BYTES = 100 << 20  # of indices kept while an item is read
_OS_ERROR = re.compile(r"os_error_code='([0-9]{1,4})'")  # in TensorStore's messages
_CRC_BYTES = 4 << 20  # copied at once where a part's bytes do not lie together

Axes = tuple[int, ...]
Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype of arrays by name


def save_item(folder: Path, arrays: Mapping[str, np.ndarray], part_axes: Mapping[str, Axes]) -> dict[str, list[int]]:
    """Writes arrays into a new folder.

    part_axes: the axes of an array that count parts: no piece of a file holds values of two parts.
    Returns CRC-32 of every part, in the order of the axes. OSError or CheckpointError when they cannot be written.
    """
    import orbax.checkpoint as ocp  # takes half a second

    save_args = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=part_axes.get(name, ())) for name in arrays}
    # A Ctrl-C waits for it: threads would go on writing into a folder that is being removed.
    with _quiet(), interrupt_deferred():
        hook = _hush()
        try:
            _checkpointer().save(folder, args=ocp.args.PyTreeSave(dict(arrays), save_args=save_args))
            sys.unraisablehook = hook
        except Exception as error:  # TensorStore has one type for all that goes wrong
            code = _OS_ERROR.search(str(error))
            if isinstance(error, (OSError, MemoryError)):
                raise
            if code is not None:
                raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
            raise CheckpointError(f"{folder.name} cannot be written: {_reason(error)}") from error
    return {name: part_sums(array, part_axes.get(name, ())).ravel().tolist() for name, array in arrays.items()}


def restore_host(
    manifest: Manifest, item: str, specs: Specs, allocate: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty
) -> dict[str, np.ndarray]:
    """The arrays of an item, whole, on the host; not yet checked against their checksums.

    Read by TensorStore, as Orbax does, but into memory of the caller's: new pages would take longer than the reading.
    specs: what they must be. allocate: makes an array that is read into. Raises CheckpointError when they are not what
    they must be, or cannot be read.
    """
    with _reading(manifest, item, specs):
        stores = _opened(manifest, item, specs)
        arrays = {name: allocate(*spec) for name, spec in specs.items()}
        for written in [tensorstore.array(arrays[name]).write(store) for name, store in stores.items()]:
            written.result()
    return arrays


def restore_sharded(
    manifest: Manifest, item: str, specs: Specs, shardings: Mapping[str, jax.sharding.Sharding]
) -> dict[str, jax.Array]:
    """The arrays of an item, each directly to its sharding; not yet checked against their checksums.

    Every process of a job restores the same items in the same order. Otherwise as restore_host.
    """
    import orbax.checkpoint as ocp

    with _reading(manifest, item, specs), _quiet():
        _opened(manifest, item, specs)
        args = {
            name: ocp.ArrayRestoreArgs(sharding=shardings[name], global_shape=shape, strict=True)
            for name, (shape, _) in specs.items()
        }
        restore_args = ocp.args.PyTreeRestore(restore_args=args)
        restored: dict[str, jax.Array] = _checkpointer().restore(manifest.folder / item, args=restore_args)
        if set(restored) != set(specs):
            raise manifest.damaged(f"{item} holds {', '.join(restored)}, not {', '.join(specs)}")
        return restored


@contextmanager
def _reading(manifest: Manifest, item: str, specs: Specs) -> Iterator[None]:
    """What goes wrong while an item is read, as a CheckpointError."""
    needed, found = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values()), manifest.item_bytes(item)
    if not found:
        raise manifest.damaged(f"{item} is missing")
    if needed > found + _INLINE_BYTES * len(specs):
        raise manifest.damaged(f"{item} has {found:,} bytes, and its arrays need {needed:,}")
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # from JSON, asyncio, Orbax and TensorStore: of many types
        raise manifest.damaged(f"{item} cannot be read: {_reason(error)}") from error


def check_sums(manifest: Manifest, item: str, name: str, whole: tuple[int, ...], array: Any, axes: Axes) -> None:
    """Holds what was restored of an array, on the host or of this process's devices, to its checksums.

    whole: the shape of all of it. Raises CheckpointError.
    """
    stated = manifest.sums.get(item, {}).get(name, [])
    parts = tuple(whole[axis] for axis in axes)
    if len(stated) != math.prod(parts):
        raise manifest.damaged(f"{item} has {len(stated)} checksums of {name}, not {math.prod(parts)}")
    wanted = np.array(stated, object).reshape(parts)
    for index, held in _shards(array):
        found = part_sums(held, axes)
        if (found != wanted[tuple(index[axis] for axis in axes)]).any():
            raise manifest.damaged(f"{item}: values of {name} are not those that were written (CRC-32)")


def _shards(array: Any) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """What is here of an array, each different part of it once."""
    if isinstance(array, np.ndarray):
        yield (slice(None),) * array.ndim, array
        return
    seen = set()
    for shard in array.addressable_shards:
        key = tuple((index.start, index.stop) for index in shard.index)
        if key not in seen:
            seen.add(key)
            yield shard.index, np.asarray(shard.data)


def part_sums(array: np.ndarray, axes: Axes) -> np.ndarray:
    """CRC-32 of the bytes of every part of an array, in the shape of the axes that count parts."""
    parts = np.moveaxis(array, axes, range(len(axes)))
    shape = parts.shape[: len(axes)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(_MAX_THREADS, cores)) as pool:
        found = list(pool.map(lambda index: _crc(parts[index]), np.ndindex(shape)))
    return np.array(found, object).reshape(shape)


def _crc(values: np.ndarray, crc: int = 0) -> int:
    """CRC-32 of an array's values in C order."""
    if values.flags.c_contiguous or values.nbytes <= _CRC_BYTES or values.ndim == 1:
        return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, crc)
    for part in values:
        crc = _crc(part, crc)
    return crc


def _opened(manifest: Manifest, item: str, specs: Specs) -> dict[str, tensorstore.TensorStore]:
    """The arrays of an item, found to be what is expected and stored as they are: before memory is taken for them."""
    context = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": _INDEX_BYTES}})
    base = {"driver": "file", "path": f"{manifest.folder / item}/"}
    opened = {}
    for name in specs:
        index = {"driver": "ocdbt", "base": base, "path": f"{name}/", "cache_pool": "cache_pool#ocdbt"}
        spec = {"driver": "zarr", "kvstore": index, "fill_missing_data_reads": False}
        opened[name] = tensorstore.open(spec, open=True, read=True, context=context)
    stores = {name: store.result() for name, store in opened.items()}
    for name, store in stores.items():
        shape, dtype = specs[name]
        found = store.dtype.numpy_dtype
        if tuple(store.shape) != shape or found != dtype:
            raise manifest.damaged(f"{item}: {name} is {found}{tuple(store.shape)}, not {dtype}{shape}")
        stored = store.spec().to_json()["metadata"]
        if stored["compressor"] or stored["filters"] or any(n > most for n, most in zip(stored["chunks"], shape)):
            raise manifest.damaged(f"{item}: {name} is compressed, or cut into pieces larger than it is")
    return stores


@cache
def _checkpointer() -> Any:
    """In a job each process for itself: one that finds damage would leave the others waiting at a barrier."""
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's log: what goes wrong is raised."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _hush() -> Callable[[Any], Any]:
    """When one write fails, others that end later find their event loop closed, and Python prints that: not from now
    on. Returns the hook of before."""
    hook = sys.unraisablehook

    def print_others(found: Any) -> None:
        if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
            hook(found)

    sys.unraisablehook = print_others
    return hook


def _reason(error: Exception) -> str:
    """What went wrong, on one line: of TensorStore's messages neither the chain of names nor the spec around it."""
    cause = error.__cause__ if type(error) is Exception and error.__cause__ is not None else error
    line = (str(cause).splitlines() or [type(cause).__name__])[0]
    return (line.partition(" [tensorstore_spec=")[0].rpartition('": ')[2] or line)[:300]
