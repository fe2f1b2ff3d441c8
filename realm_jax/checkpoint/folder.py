"""A folder that is there whole or not at all, whatever ends the process that writes it."""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from realm_jax.errors import CheckpointError

_PARTIAL = ".partial-"
_REMOVALS = 100  # times that it is tried
_SLACK = 16 << 20  # bytes left free beside what a checkpoint needs
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextmanager
def new_folder(target: Path, *, replaces: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder beside `target` to write into, which becomes `target` in one step when the block ends.

    When the block fails it is removed. What a killed process has left is removed by the next call for this target.

    Args:
        target: a real path (os.path.realpath). An empty folder there may be replaced always.
        replaces: whether the folder that is there now may be replaced; asked when the block has ended.

    Raises:
        CheckpointError: the folder cannot be made, written or put in place; an OSError of the block comes as one.
    """
    with _errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial, lock = _make_partial(target)
    try:
        with _errors(target):
            yield partial
            _flush(partial)
            _put_in_place(partial, target, replaces)
    finally:
        # Of what is left: nothing, the old folder, or what has failed.
        _remove(partial)
        os.close(lock)


def require_space(target: Path, needed: int) -> None:
    """CheckpointError when fewer than `needed` bytes are free where `target` is going to be."""
    with _errors(target):
        place = target
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
    if free < needed + _SLACK:
        raise CheckpointError(f"{target}: no space: {needed + _SLACK:,} bytes are needed and {free:,} are free")


def _make_partial(target: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock, which the system lets go of when the process ends."""
    while True:
        partial = target.with_name(target.name + _PARTIAL + secrets.token_hex(4))
        partial.mkdir()
        lock = _locked(partial)
        # Another process may have taken it for abandoned before it was locked.
        if lock is not None and partial.exists():
            return partial, lock
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor with the folder's lock; None where another process has it, or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(target: Path) -> None:
    for entry in list(os.scandir(target.parent)):
        if entry.name.startswith(target.name + _PARTIAL) and entry.is_dir(follow_symlinks=False):
            lock = _locked(Path(entry.path))
            if lock is not None:
                _remove(Path(entry.path))
                os.close(lock)


def _remove(folder: Path) -> None:
    """Removes a folder, if it is there, for good: threads of a save that failed may be writing into it still, and make
    it again, and another process may be removing it too."""
    for _ in range(_REMOVALS):
        if not os.path.lexists(folder):
            return
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise
        time.sleep(0.1)
    raise CheckpointError(f"{folder}: cannot be removed: something is still writing to it")


def _flush(folder: Path) -> None:
    """Every file to the disk, so that a power cut after the renaming leaves a whole folder."""
    for directory, _, names in os.walk(folder):
        for path in [directory, *(os.path.join(directory, name) for name in names)]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _put_in_place(partial: Path, target: Path, replaces: Callable[[Path], bool]) -> None:
    try:
        os.rename(partial, target)  # over nothing, or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not replaces(target):
            raise CheckpointError(f"{target}: something has appeared there meanwhile; nothing was written") from error
        _exchange(partial, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(partial: Path, target: Path) -> None:
    """The two folders change places in one step: there is no moment without a whole one."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        code = errno.ENOSYS
    else:
        done = rename(_AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
        code = 0 if done == 0 else ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        raise CheckpointError(
            f"{target}: this file system cannot exchange two folders in one step; remove the old one first"
        )
    if code:
        raise OSError(code, os.strerror(code), str(target))


@contextmanager
def _errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free
            raise CheckpointError(f"{target}: no space is left on the disk ({free:,} bytes are free)") from error
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from error
