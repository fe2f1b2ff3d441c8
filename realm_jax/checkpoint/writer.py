"""From a GGUF file to a checkpoint, one stack of tensors in memory at a time."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from realm_jax.checkpoint.arrays import save_item
from realm_jax.checkpoint.file import listed
from realm_jax.checkpoint.folder import new_folder, require_space
from realm_jax.checkpoint.header import HEADER_FILE, write_header
from realm_jax.checkpoint.layout import VECTORS, item_of, segments_of
from realm_jax.checkpoint.manifest import MODEL, Sums, checked_target, is_checkpoint, write_manifest
from realm_jax.gguf import GGUFFile, open_gguf
from realm_jax.gguf.file import display_path
from realm_jax.model.config import ModelConfig
from realm_jax.model.tensors import TensorSpec, check_model, group_by_stack
from realm_jax.quant import QuantizedTensor, format_of, pack, packed_spec
from realm_jax.text import load_tokenizer

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What was written. path: of the checkpoint; source: of the GGUF file; size: bytes of all files."""

    path: str
    source: str
    tensors: int
    size: int


def compute_on_host() -> None:
    """For a process that does nothing but convert: JAX takes no accelerator and none of its memory."""
    jax.config.update("jax_platforms", "cpu")


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Writes the checkpoint of a GGUF file: packed weights, config, tokenizer and chat template.

    Until it is whole there is nothing at `directory`, or what was there before, whatever ends this process.

    Args:
        source: path of the file.
        directory: to write; a new one, or an empty one.
        force: a checkpoint there may be replaced.
        progress: called as tensors are converted, with bytes of the GGUF file.

    Raises:
        GGUFError, UnsupportedModelError, TokenizerError: loading would refuse the file, too.
        CheckpointError: there is something at `directory`, or it cannot be written.
    """
    target = checked_target(directory, force=force)
    with open_gguf(source) as file:
        config, specs = check_model(file)
        load_tokenizer(file)
        require_space(target, sum(file.tensors[spec.name].nbytes for spec in specs))
        with new_folder(target, replaces=lambda found: force and is_checkpoint(found)) as folder:
            write_header(folder / HEADER_FILE, file.metadata)
            sums = _write_weights(file, folder, config, specs, progress)
            write_manifest(folder, MODEL, sums, {"tensors": listed(file.tensors)})
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return Conversion(display_path(target), display_path(file.path), len(file.tensors), size)


def _write_weights(
    file: GGUFFile, folder: Path, config: ModelConfig, specs: list[TensorSpec], progress: Progress | None
) -> dict[str, Sums]:
    total, done = sum(file.tensors[spec.name].nbytes for spec in specs), 0
    sums: dict[str, Sums] = {}
    vectors: dict[str, np.ndarray] = {}
    groups, _ = group_by_stack(specs, lambda spec: file.tensors[spec.name].type.name)
    for stack, members in groups.items():
        if members[0].is_matrix:
            item, arrays, axes = item_of(stack), {}, {}
            fmt = format_of(file.tensors[members[0].name].type)
            packed = _packed(file, members, fmt.name)
            for segment in segments_of(members, fmt, config):
                for name in segment.arrays:
                    arrays[segment.key(name)] = segment.take(packed[name])
                    axes[segment.key(name)] = segment.part_axes
            sums[item] = save_item(folder / item, arrays, axes)
        else:
            vectors[stack] = _floats(file, members)
        for spec in members:
            file.release(spec.name)
            done += file.tensors[spec.name].nbytes
        if progress is not None:
            progress("converting", done, total)
    sums[VECTORS] = save_item(folder / VECTORS, vectors, {})
    return sums


def _packed(file: GGUFFile, members: list[TensorSpec], format: str) -> dict[str, np.ndarray]:
    """A matrix, or a stack of them, in rows."""
    stacked = members[0].layer is not None
    shape = (len(members), *members[0].shape) if stacked else members[0].shape
    arrays = {name: np.empty(s, dtype) for name, (s, dtype) in packed_spec(shape, format).items()}
    for i, spec in enumerate(members):
        out = {name: array[i] for name, array in arrays.items()} if stacked else arrays
        pack(file.data(spec.name), spec.shape, format, out=out)
    return arrays


def _floats(file: GGUFFile, members: list[TensorSpec]) -> np.ndarray:
    """Vectors as float32 [layers, ...], or the only one's [...]."""
    out = []
    for spec in members:
        fmt = format_of(file.tensors[spec.name].type)
        arrays = pack(file.data(spec.name), spec.shape, fmt.name)
        out.append(np.asarray(QuantizedTensor(arrays=arrays, format=fmt.name).dequantize()))
    return out[0] if members[0].layer is None else np.stack(out)
