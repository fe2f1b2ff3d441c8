"""The folder downloads live in: private to the user, locked per model, files put in place whole or not at all."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from realm_jax.errors import DownloadError

# progress(what, done, total): bytes so far and in all; total is 0 where it is not known.
Progress = Callable[[str, int, int], None]

_CHUNK = 1 << 20
# Left free beside what a download needs: a full disk breaks other programs too.
_SLACK = 16 << 20


def cache_root() -> Path:
    """The cache folder, made with mode 0700 where it is missing: REALM_CACHE, else the user's cache folder.

    Raises:
        DownloadError: it cannot be made.
    """
    named = os.environ.get("REALM_CACHE")
    if named:
        root = Path(named).expanduser().absolute()
    elif os.environ.get("HOME") == "" and not os.environ.get("XDG_CACHE_HOME"):
        # With an empty HOME "~" would mean the root folder; the password database knows better.
        import pwd

        root = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache" / "realm-jax"
    else:
        root = Path(user_cache_dir("realm-jax", appauthor=False))
    make_private(root)
    return root


def make_private(folder: Path) -> None:
    """Make `folder` (mode 0700) and its missing parents.

    Raises:
        DownloadError: it cannot be made or is something else than a folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"cannot make the cache folder {folder}: {reason(error)}; REALM_CACHE names another place"
        ) from error


def reason(error: OSError) -> str:
    """What the operating system says went wrong, without the error number."""
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def locked(folder: Path, what: str, progress: Progress | None) -> Iterator[None]:
    """Hold the lock of `folder`'s model, so that two processes never fetch it at once; a dead owner's lock is free."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress is not None:
                progress(f"waiting for another process that fetches {what}", 0, 0)
            lock.acquire()
    except OSError as error:
        raise DownloadError(f"cannot lock {lock.lock_file}: {reason(error)}") from error
    try:
        yield
    finally:
        lock.release()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse a download that cannot fit.

    Raises:
        DownloadError: fewer than `needed` bytes (and a little slack) are free where `folder` is.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + _SLACK:
        raise no_space(folder, needed, what)


def no_space(folder: Path, needed: int, what: str) -> DownloadError:
    """The error for a full disk, with both numbers."""
    free = shutil.disk_usage(folder).free
    return DownloadError(
        f"no space in {folder} for {what}: {needed + _SLACK:,} bytes needed, {free:,} free; "
        "free some or set REALM_CACHE to another place"
    )


@contextmanager
def disk_errors(folder: Path, needed: int, what: str) -> Iterator[None]:
    """Turn a failed write into one typed error; a full disk names the bytes needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(folder, needed, what) from error
        raise DownloadError(f"cannot store {what} in {folder}: {reason(error)}") from error


def copy_checked(
    source: IO[bytes], part: Path, size: int, sha256: str | None, what: str, progress: Progress | None
) -> None:
    """Copy `source` to `part`, flushed to the disk, refusing any other size or sha256.

    Raises:
        DownloadError: the content is not what was announced; `part` is removed.
    """
    digest = hashlib.sha256()
    done = 0
    with part.open("wb") as out:
        while block := source.read(_CHUNK):
            done += len(block)
            if done > size:  # a lying archive must not fill the disk
                break
            digest.update(block)
            out.write(block)
            if progress is not None:
                progress(f"unpacking {what}", done, size)
        out.flush()
        os.fsync(out.fileno())
    verify(part, done, digest.hexdigest(), size, sha256, what)


def verify(part: Path, size: int, digest: str, expected_size: int | None, sha256: str | None, what: str) -> None:
    """Remove `part` and raise DownloadError unless its size (bytes) and sha256 are the expected ones."""
    if expected_size is not None and size != expected_size:
        part.unlink(missing_ok=True)
        more = "more than " if size > expected_size else f"{size:,} bytes, not the expected "
        raise DownloadError(f"{what} was damaged on its way: {more}{expected_size:,} bytes; it was removed, try again")
    if sha256 is not None and digest != sha256:
        part.unlink(missing_ok=True)
        raise DownloadError(f"{what} was damaged on its way: sha256 {digest}, not {sha256}; it was removed, try again")


def hash_file(path: Path) -> "hashlib._Hash":
    """The sha256 state after `path`'s bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest


def put_in_place(part: Path, target: Path) -> None:
    """Rename `part` to `target` in one step that survives a power cut."""
    os.replace(part, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def largest_file(folder: Path) -> int:
    """Bytes of the largest file under `folder`: how far a program that downloads into it has come."""
    largest = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(directory, name)).st_size)
            except OSError:  # renamed or removed meanwhile
                continue
    return largest
