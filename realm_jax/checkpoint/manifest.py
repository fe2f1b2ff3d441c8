"""realm.json, which makes a folder a checkpoint: what it holds, of which version, and the checksums of it. No jax."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from realm_jax.errors import CheckpointError, InvalidRequestError
from realm_jax.gguf.file import display_path
from realm_jax.registry.local import CHECKPOINT_FILE

FORMAT = 1
MODEL, TRAINING, ADAPTER = "model", "training state", "adapter"

_MAX_BYTES = 256 << 20
_HASHED_BYTES = 64 << 20  # smaller files of metadata are hashed as a whole; arrays have checksums of their own

Sums = dict[str, list[int]]  # of each array, by its path in the tree: CRC-32 of every part


@dataclass(frozen=True)
class Manifest:
    """What realm.json says, checked for its form.

    folder: of the checkpoint, a real path. kind: MODEL, TRAINING or ADAPTER. written_by: version of Realm. files: size
    by path in the folder. hashes: sha256 of the files that are not arrays. sums: by item, see Sums. content: what the
    kind of checkpoint says beside.
    """

    folder: Path
    kind: str
    written_by: str
    files: Mapping[str, int]
    hashes: Mapping[str, str]
    sums: Mapping[str, Sums]
    content: Mapping[str, Any]

    @property
    def label(self) -> str:
        return display_path(self.folder)

    def damaged(self, problem: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {self.label} is damaged: {problem}")

    def item_bytes(self, item: str) -> int:
        """Bytes of the files of an item."""
        return sum(size for name, size in self.files.items() if name.startswith(f"{item}/"))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is, or claims to be, a checkpoint of Realm's."""
    return (folder / CHECKPOINT_FILE).is_file()


def checked_target(directory: str | os.PathLike[str], *, force: bool) -> Path:
    """The real path of a folder that a checkpoint may be written to: nothing is there, or what may be replaced.

    Raises CheckpointError.
    """
    try:
        if not os.fspath(directory):
            raise InvalidRequestError("the checkpoint's folder has an empty name; accepted: a folder")
        target = Path(os.path.realpath(os.fsdecode(directory)))
        label = display_path(target)
        if not os.path.lexists(target):
            return target
        if not target.is_dir():
            raise CheckpointError(f"{label} is there already, and is no folder; a new folder is accepted")
        if not any(target.iterdir()):
            return target
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(directory)!r} cannot be written: {error}") from error
    if not is_checkpoint(target):
        raise CheckpointError(f"the folder {label} holds other things than a checkpoint; a new folder is accepted")
    if not force:
        raise CheckpointError(f"there is a checkpoint in {label} already; force (--force) replaces it")
    return target


def write_manifest(folder: Path, kind: str, sums: Mapping[str, Sums], content: Mapping[str, Any]) -> None:
    """Writes realm.json into a folder that holds everything else."""
    files, hashes = {}, {}
    for path in _files_of(folder):
        name = path.relative_to(folder).as_posix()
        files[name] = path.stat().st_size
        if not _is_array_data(name) and files[name] <= _HASHED_BYTES:
            hashes[name] = _sha256(path)
    fields = {
        "format": FORMAT,
        "realm": version("realm-jax"),
        "kind": kind,
        **content,
        "files": files,
        "sha256": hashes,
        "crc32": sums,
    }
    (folder / CHECKPOINT_FILE).write_text(json.dumps(fields) + "\n")


def read_manifest(folder: str | os.PathLike[str], kind: str) -> Manifest:
    """Reads realm.json, and holds the files of the folder to it: none is missing, cut short, changed or too many.

    Array data is not read; its checksums are checked when it is.

    Raises:
        CheckpointError: it is no checkpoint, is damaged, of another kind, or written by a newer version.
    """
    try:
        folder = Path(os.path.realpath(os.fsdecode(folder)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(folder)!r} is no checkpoint: {error}") from error
    label = display_path(folder)
    fields = _read_json(folder, label)
    form = fields.get("format")
    if type(form) is not int or form < 1:
        raise CheckpointError(f"checkpoint {label} is damaged: {CHECKPOINT_FILE} names no format")
    written_by = fields.get("realm")
    if form > FORMAT:
        shown = f" (realm-jax {written_by[:40]})" if isinstance(written_by, str) else ""
        raise CheckpointError(
            f"checkpoint {label} was written by a newer version{shown}: its format is {form}, and this version reads "
            f"up to {FORMAT}; convert the model again, or install the newer version"
        )
    found = fields.get("kind")
    if found != kind and found in (MODEL, TRAINING, ADAPTER):
        raise CheckpointError(f"checkpoint {label} is of the kind {found!r}; {kind!r} is accepted here")
    manifest = Manifest(
        folder=folder,
        kind=kind,
        written_by=str(written_by)[:40],
        files=_table(fields, "files", label),
        hashes=_table(fields, "sha256", label),
        sums=_table(fields, "crc32", label),
        content=fields,
    )
    if found != kind:
        raise manifest.damaged(f"{CHECKPOINT_FILE} names no known kind")
    _check_form(manifest)
    _check_files(manifest)
    return manifest


def _read_json(folder: Path, label: str) -> dict[str, Any]:
    path = folder / CHECKPOINT_FILE
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise CheckpointError(f"checkpoint {label} is damaged: {CHECKPOINT_FILE} is no regular file")
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{label} is no checkpoint: a folder with {CHECKPOINT_FILE} is accepted") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {label} cannot be read: {error.strerror or error}") from error
    if len(raw) > _MAX_BYTES:
        raise CheckpointError(f"checkpoint {label} is damaged: {CHECKPOINT_FILE} has more than {_MAX_BYTES:,} bytes")
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise CheckpointError(f"checkpoint {label} is damaged: {CHECKPOINT_FILE} is cut short or no JSON object")
    return fields


def _table(fields: dict[str, Any], key: str, label: str) -> dict[str, Any]:
    value = fields.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint {label} is damaged: {CHECKPOINT_FILE} has no table {key!r}")
    return value


def _check_form(manifest: Manifest) -> None:
    for name, size in manifest.files.items():
        if type(size) is not int or size < 0 or any(part in ("", ".", "..") for part in name.split("/")):
            raise manifest.damaged(f"{CHECKPOINT_FILE} lists a file {name[:80]!r} of {str(size)[:40]} bytes")
    for name in manifest.hashes:
        if name not in manifest.files:
            raise manifest.damaged(f"{CHECKPOINT_FILE} has a sha256 of {name[:80]!r}, which it does not list")
    for item, sums in manifest.sums.items():
        if not isinstance(sums, dict) or not all(
            isinstance(parts, list) and all(type(crc) is int for crc in parts) for parts in sums.values()
        ):
            raise manifest.damaged(f"{CHECKPOINT_FILE} has no checksums of {item[:80]!r}")


def _check_files(manifest: Manifest) -> None:
    """Every file that is listed is there, regular and of its size, and no other is."""
    for path in _files_of(manifest.folder):
        name = path.relative_to(manifest.folder).as_posix()
        if name != CHECKPOINT_FILE and name not in manifest.files:
            raise manifest.damaged(f"the file {name[:200]!r} does not belong to it")
    for name, size in manifest.files.items():
        path = manifest.folder / name
        try:
            found = os.lstat(path)
        except (OSError, ValueError):
            raise manifest.damaged(f"the file {name[:200]!r} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise manifest.damaged(f"{name[:200]!r} is no regular file")
        if found.st_size != size:
            raise manifest.damaged(f"the file {name[:200]!r} has {found.st_size:,} bytes, and had {size:,}")
    for name, digest in manifest.hashes.items():
        if _sha256(manifest.folder / name) != digest:
            raise manifest.damaged(f"the file {name[:200]!r} has other content than was written")


def _files_of(folder: Path) -> list[Path]:
    """Every file in a folder, links to folders among them: nothing that it holds is left out."""
    found = []
    for directory, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(directory, name))]
        found += [Path(directory, name) for name in [*names, *links]]
    return sorted(found)


def _is_array_data(name: str) -> bool:
    """Of Orbax's files those that hold values of arrays."""
    return "/d/" in name


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{display_path(path)}: cannot be read: {error.strerror or error}") from error
