"""From the name a user gives to a file or a checkpoint: a local path, a named model, or a model on the hub."""

import shutil
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from realm_jax.errors import ModelNotFoundError
from realm_jax.registry import local, store, table
from realm_jax.registry.hub import HubName, files_here
from realm_jax.registry.pypi import WheelFile
from realm_jax.registry.store import Progress


@dataclass(frozen=True)
class ModelStatus:
    """A row of `realm models list`: `size` in bytes (None: not known before the download), `path` if it is here."""

    name: str
    about: str
    license: str
    source: str
    size: int | None
    path: Path | None


def resolve(name: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The GGUF file that `name` means, downloaded first where needed; the first part of a split one; or the folder of a
    checkpoint.

    Args:
        name: a path (a file, a folder with one model, or a checkpoint), a name of `realm models list`,
            `owner/name[:QUANT]` or `owner/name/file.gguf` on the Hugging Face hub; None means the small default model.
        progress: told of a download as progress(what, bytes done, bytes in all or 0).

    Raises:
        ModelNotFoundError: nothing of that name.
        DownloadError: it could not be fetched.
    """
    found = _local(name) if name is not None else None
    if found is not None:
        return found
    source = _source(name)
    root = store.cache_root()
    here = source.cached(root)
    if here is not None:
        return here
    folder = source.folder(root)
    store.make_private(folder.parent)
    with store.locked(folder, str(name or table.default_name()), progress):
        # Another process may have fetched it while this one waited.
        return source.cached(root) or source.fetch(root, progress)


def find(name: str | Path | None = None) -> Path:
    """Like `resolve`, but never downloads.

    Raises:
        ModelNotFoundError: nothing of that name is here.
    """
    found = _local(name) if name is not None else None
    if found is None:
        found = _source(name).cached(store.cache_root())
    if found is None:
        shown = name or table.default_name()
        raise ModelNotFoundError(f"{shown} is not downloaded; realm models pull {shown} fetches it")
    return found


def remove(name: str) -> int:
    """Delete a downloaded model, its partial downloads included; returns the bytes freed.

    Raises:
        ModelNotFoundError: nothing of that name is in the cache.
    """
    source = _source(name)
    root = store.cache_root()
    folder = source.folder(root)
    missing = ModelNotFoundError(f"{name} is not downloaded: there is nothing to remove")
    if not folder.is_dir():
        raise missing
    with store.locked(folder, name, None):
        if isinstance(source, HubName) and (source.quant or source.file):
            paths = source.parts(root)
            paths += (folder / ".download").glob("*") if not paths else []
        else:
            paths = [path for path in folder.rglob("*") if path.is_file()]
        if not paths:
            raise missing
        freed = sum(path.stat().st_size for path in paths)
        for path in paths:
            path.unlink()
        if not any(path.is_file() for path in folder.rglob("*")):
            shutil.rmtree(folder)
    return freed


def listing() -> list[ModelStatus]:
    """Every named model, then every other model in the cache."""
    root = store.cache_root()
    rows = []
    shown: set[Path | None] = set()
    for entry in table.entries().values():
        path = entry.source.cached(root)
        shown.add(path)
        size = entry.source.size if isinstance(entry.source, WheelFile) else _size(path) if path else None
        origin = "pypi" if isinstance(entry.source, WheelFile) else "hub"
        rows.append(ModelStatus(entry.name, entry.about, entry.license, f"{origin} {entry.source}", size, path))
    for folder in sorted(path for path in (root / "hub").glob("*--*") if path.is_dir()):
        for parts in local.group_parts(files_here(folder)).values():
            path = folder / parts[0]
            if path not in shown:
                name = f"{folder.name.replace('--', '/', 1)}/{parts[0]}"
                rows.append(ModelStatus(name, "", "", f"hub {name}", _size(path), path))
    return rows


def _local(name: str | Path) -> Path | None:
    """The file that `name` is a path of, or None where it may still be a name."""
    text = str(name)
    path = Path(name).expanduser() if text.startswith("~") else Path(name)
    try:
        if text and path.is_dir():
            return local.in_folder(path)
        if text and path.exists():
            return path
    except OSError as error:
        raise ModelNotFoundError(f"cannot open {text!r}: {store.reason(error)}") from error
    except ValueError as error:
        raise ModelNotFoundError(f"{text!r} cannot be a file name: {error}") from error
    names_file = text.lower().endswith(".gguf") and (text.count("/") < 2 or path.parent.is_dir())
    if isinstance(name, Path) or not text or text[0] in "./~" or names_file or "\\" in text or "\0" in text:
        raise ModelNotFoundError(f"no such file: {text!r}")
    return None


def _source(name: str | Path | None) -> WheelFile | HubName:
    """Where a name that is no local path is fetched from."""
    named = table.entries()
    text = table.default_name() if name is None else str(name)
    entry = named.get(text.lower())
    if entry is not None:
        return entry.source
    if "/" in text:
        return HubName.parse(text)
    close = get_close_matches(text.lower(), named, n=1)
    hint = f"did you mean {close[0]}?" if close else "realm models list shows the names"
    raise ModelNotFoundError(
        f"no model {text!r}: not a file, not a named model ({hint}), and not owner/name[:QUANT] on the Hugging Face hub"
    )


def _size(first: Path) -> int:
    """Bytes of a model, every part counted."""
    names = [path.name for path in first.parent.glob("*.gguf")]
    parts = next(parts for parts in local.group_parts(names).values() if first.name in parts)
    return sum((first.parent / part).stat().st_size for part in parts)
