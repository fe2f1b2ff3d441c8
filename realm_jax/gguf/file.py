"""A GGUF file opened for reading: checked header, memory-mapped tensor data, single or split."""

import contextlib
import io
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from realm_jax.errors import GGUFError
from realm_jax.gguf.header import Header, HeaderReader, TensorInfo, quote
from realm_jax.gguf.split import TENSORS_KEY, Split, part_name_of, part_paths, read_split


def open_gguf(path: str | os.PathLike[str]) -> "GGUFFile":
    """Open a GGUF file of version 2 or 3, little endian. Of a split file any part may be named; all parts are opened.

    Raises GGUFError for a file that cannot be read, is damaged, or is unsafe to load.
    """
    return GGUFFile(path)


class GGUFFile:
    """A GGUF file, read-only. A context manager; arrays from `data` stay valid after `close`.

    path: the file as it was named; parts: the files it consists of (one, unless split); nbytes: their total size.
    format, version: "gguf", 2 or 3.
    metadata: key -> int, float, bool, str, list of str, or read-only numpy array (arrays of numbers and booleans). Text
        that is no UTF-8 keeps its bytes as surrogate escapes. Of a split file, the first part's.
    tensors: name -> TensorInfo, in file order.

    Raises GGUFError on opening. Not for files that others write to meanwhile: `data` checks that the file is still long
    enough, but a file cut short while an array of it is in use ends the process (SIGBUS), as with any memory map.
    """

    format = "gguf"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.fsdecode(path))
        self._parts: list[_Part] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        named = _Part(self.path)
        self._parts = [named]
        split = read_split(named.header.metadata, named.label)
        if split is not None:
            self._open_other_parts(named, split)
        else:
            _check_whole(named)
        first = self._parts[0].header
        self.parts = tuple(part.path for part in self._parts)
        self.nbytes = sum(part.size for part in self._parts)
        self.version = first.version
        self.metadata: Mapping[str, Any] = MappingProxyType(first.metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._collect_tensors())
        if split is not None:
            self._check_tensor_count()

    def _open_other_parts(self, named: "_Part", split: Split) -> None:
        # All of them have to be there before any is opened: a hostile count stops at the first that is missing.
        for number, path in enumerate(part_paths(self.path, split, named.label)):
            if not os.path.exists(path):
                raise GGUFError(f"{named.label}: part {number + 1} of {split.count} is missing: {display_path(path)}")
        for number, path in enumerate(part_paths(self.path, split, named.label)):
            if number == split.number:
                continue
            part = _Part(path)
            self._parts.append(part)
            found = read_split(part.header.metadata, part.label)
            if found is None or (found.number, found.count) != (number, split.count):
                says = "no 'split.count'" if found is None else f"part {found.number + 1} of {found.count}"
                raise GGUFError(f"{part.label}: the file says {says}, but its name part {number + 1} of {split.count}")
            if found.tensors != split.tensors:
                raise GGUFError(
                    f"{part.label}: metadata key '{TENSORS_KEY}' is {found.tensors}, "
                    f"but {split.tensors} in {named.label}"
                )
        self._parts.remove(named)
        self._parts.insert(split.number, named)

    def _collect_tensors(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for number, part in enumerate(self._parts):
            for tensor in part.header.tensors:
                if tensor.name in tensors:
                    other = self._parts[tensors[tensor.name].part].label
                    raise GGUFError(f"{part.label}: tensor {quote(tensor.name)} is in {other} too; names are unique")
                tensors[tensor.name] = replace(tensor, part=number) if number else tensor
        return tensors

    def _check_tensor_count(self) -> None:
        stated = self.metadata.get(TENSORS_KEY)
        if stated != len(self.tensors):
            raise GGUFError(
                f"{self._parts[0].label}: metadata key '{TENSORS_KEY}' is {stated}, but the {len(self._parts)} parts "
                f"hold {len(self.tensors)} tensors"
            )

    def data(self, name: str) -> np.ndarray:
        """The bytes of a tensor: a read-only uint8 array [nbytes] that looks into the memory map; nothing is copied.

        Raises GGUFError when there is no such tensor or the file has been cut short, ValueError after `close`.
        """
        info = self._info(name)
        part = self._part(info)
        return part.view(info)

    def release(self, name: str) -> None:
        """Let go of the memory that reading a tensor's data has filled; reading it again reads the file again.

        Does nothing where the system has no madvise. Arrays from `data` stay valid.
        """
        info = self._info(name)
        self._part(info).release(info)

    def close(self) -> None:
        """Close the file. The memory map itself goes when the last array that looks into it does."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.tensors)} tensors, {self.nbytes} bytes)"

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise GGUFError(f"{self._parts[0].label}: there is no tensor {quote(name)}") from None

    def _part(self, info: TensorInfo) -> "_Part":
        return self._parts[info.part]


class _Part:
    """One file: its header and its memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = display_path(path)
        self._map: mmap.mmap | None = None
        self._bytes: np.ndarray | None = None  # uint8 [size], a view of _map
        self._file = _open_regular(path, self.label)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.header: Header = HeaderReader(self._file, self.size, self.label).read()
            if self.header.tensors:
                self._map = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
                self._bytes = np.frombuffer(self._map, np.uint8)
        except OSError as error:
            self.close()
            raise GGUFError(f"{self.label}: cannot be read: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def view(self, info: TensorInfo) -> np.ndarray:
        if self._bytes is None:
            raise ValueError(f"{self.label} is closed")
        size = os.fstat(self._file.fileno()).st_size
        if size < info.offset + info.nbytes:
            raise GGUFError(
                f"{self.label}: tensor {quote(info.name)} ends at byte {info.offset + info.nbytes}, but the file has "
                f"been cut to {size} bytes; it had {self.size} when it was opened"
            )
        return self._bytes[info.offset : info.offset + info.nbytes]

    def release(self, info: TensorInfo) -> None:
        if self._map is None or not hasattr(self._map, "madvise"):
            return
        # Whole pages, those shared with a neighbour included: the map is read-only, so dropping them loses nothing.
        start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def close(self) -> None:
        self._bytes = None
        if self._map is not None:
            # While arrays look into it, it stays: it is unmapped with the last of them.
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
        self._file.close()


def _check_whole(part: "_Part") -> None:
    by_name = part_name_of(part.path)
    if by_name is not None and by_name[1] > 1:
        raise GGUFError(
            f"{part.label}: the name says part {by_name[0] + 1} of {by_name[1]}, but the file has no 'split.count'; "
            "another name is accepted for a file that is whole"
        )


def display_path(path: Path) -> str:
    """A path for a one-line message; quoted where it holds characters that do not print."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _open_regular(path: Path, label: str) -> io.FileIO:
    """Open a regular file, looking at what it is before and after: opening a pipe would wait, a device might act."""
    try:
        _check_regular(os.stat(path).st_mode, label)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = io.FileIO(path, "rb", opener=lambda name, _: os.open(name, flags))
    except FileNotFoundError:
        raise GGUFError(f"{label}: there is no such file") from None
    except ValueError:
        raise GGUFError(f"{label}: a file name cannot hold a NUL character") from None
    except OSError as error:
        raise GGUFError(f"{label}: cannot be opened: {error.strerror or error}") from error
    try:
        _check_regular(os.fstat(file.fileno()).st_mode, label)
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(mode: int, label: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    raise GGUFError(f"{label}: is {kinds.get(stat.S_IFMT(mode), 'a device')}; a regular file is accepted")
