"""A model's checkpoint opened for reading: what a GGUFFile tells of a file, without its data. No jax."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from realm_jax.checkpoint.header import HEADER_FILE
from realm_jax.checkpoint.manifest import MODEL, is_checkpoint, read_manifest
from realm_jax.errors import GGUFError
from realm_jax.gguf import GGMLType, GGUFFile, TensorInfo, open_gguf


def open_model(path: str | os.PathLike[str]) -> "GGUFFile | CheckpointFile":
    """Opens a GGUF file, or the checkpoint in a folder.

    Raises:
        GGUFError: see open_gguf.
        CheckpointError: see CheckpointFile.
    """
    path = Path(os.fsdecode(path))
    return CheckpointFile(path) if is_checkpoint(path) else open_gguf(path)


class CheckpointFile:
    """The checkpoint of a model, read-only. A context manager.

    path: as it was named; parts: it alone; nbytes: of its files.
    format, version: "checkpoint", and its number.
    metadata, tensors: as of a GGUFFile; a tensor's nbytes and type are those of the file it was converted from.

    Raises CheckpointError on opening when it is damaged, cut short, or written by a newer version.
    """

    format = "checkpoint"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.fsdecode(path))
        self.parts = (self.path,)
        self.manifest = read_manifest(self.path, MODEL)
        self.version = int(self.manifest.content["format"])
        self.nbytes = sum(self.manifest.files.values())
        if HEADER_FILE not in self.manifest.files:
            raise self.manifest.damaged(f"the file {HEADER_FILE!r} is missing")
        try:
            with open_gguf(self.manifest.folder / HEADER_FILE) as header:
                self.metadata: Mapping[str, Any] = header.metadata
        except GGUFError as error:
            raise self.manifest.damaged(str(error)) from error
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._read_tensors())

    def reader(self, specs: Any, layout: Any, progress: Any) -> Any:
        """A CheckpointReader of this file, for load_model; imports Orbax."""
        from realm_jax.checkpoint.reader import CheckpointReader

        return CheckpointReader(self, specs, layout, progress)

    def _read_tensors(self) -> dict[str, TensorInfo]:
        rows = self.manifest.content.get("tensors")
        if not isinstance(rows, list):
            raise self.manifest.damaged("it lists no tensors")
        tensors: dict[str, TensorInfo] = {}
        for row in rows:
            info = _tensor(row)
            if info is None or info.name in tensors:
                raise self.manifest.damaged(f"it lists a tensor {str(row)[:100]}")
            tensors[info.name] = info
        return tensors

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> "CheckpointFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CheckpointFile({str(self.path)!r}, {len(self.tensors)} tensors, {self.nbytes} bytes)"


def listed(tensors: Mapping[str, TensorInfo]) -> list[list[Any]]:
    """Tensors as realm.json lists them: [name, type, shape]."""
    return [[info.name, info.type.name, list(info.shape)] for info in tensors.values()]


def _tensor(row: Any) -> TensorInfo | None:
    """A row of the list; None for one that is none."""
    if not (isinstance(row, list) and len(row) == 3):
        return None
    name, kind, shape = row
    if not isinstance(name, str) or not isinstance(kind, str) or not isinstance(shape, list):
        return None
    if kind not in GGMLType.__members__:
        return None
    elements = 1
    for n in shape:
        if type(n) is not int or n < 1:
            return None
        elements *= n
        if elements >= 1 << 63:
            return None
    ggml_type = GGMLType[kind]
    if (shape[-1] if shape else 1) % ggml_type.block_size:
        return None
    return TensorInfo(name, tuple(shape), ggml_type, ggml_type.nbytes(elements), 0)
