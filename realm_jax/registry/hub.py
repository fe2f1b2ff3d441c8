"""Models on the Hugging Face hub: `owner/name[:QUANT]` or `owner/name/path/file.gguf`, with the user's own login."""

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from realm_jax.errors import DownloadError, ModelNotFoundError
from realm_jax.registry import store
from realm_jax.registry.local import group_parts
from realm_jax.registry.store import Progress

_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,95}"
_NAME = re.compile(
    rf"(?P<repo>{_SEGMENT}/{_SEGMENT})(?::(?P<quant>[A-Za-z0-9_.\-]+)|/(?P<file>(?:{_SEGMENT}/)*{_SEGMENT}\.gguf))?"
)
_SAFE_PATH = re.compile(rf"(?:{_SEGMENT}/)*{_SEGMENT}")
_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30.0
_RETRIES = 5
_LISTED = 12


@dataclass(frozen=True)
class HubName:
    """A model on the hub: a repository, with a quantization or a file where it holds several."""

    repo: str
    quant: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, name: str) -> "HubName":
        """Read `owner/name`, `owner/name:QUANT` or `owner/name/path/file.gguf`.

        Raises:
            ModelNotFoundError: the name has none of these forms.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ModelNotFoundError(
                f"{name!r} is no hub name; owner/name, owner/name:QUANT or owner/name/file.gguf is"
            )
        return cls(match["repo"], match["quant"], match["file"])

    def __str__(self) -> str:
        return self.repo + (f":{self.quant}" if self.quant else f"/{self.file}" if self.file else "")

    def select(self, names: list[str]) -> list[str]:
        """The files meant among a repository's: one file, or all parts of a split one, in order.

        QUANT has to be a whole word of the file's path, in either case: Q4_K_M does not match IQ4_K_M or Q4_K_M_L.

        Raises:
            ModelNotFoundError: none or several match; the choices are listed.
        """
        groups = group_parts(names)
        if self.file is not None:
            found = [parts for parts in groups.values() if self.file in parts]
        elif self.quant is not None:
            word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(self.quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
            found = [parts for parts in groups.values() if word.search(parts[0])]
        else:
            found = list(groups.values())
        if len(found) == 1:
            return found[0]
        choices = [parts[0] for parts in (found or groups.values())]
        listed = ", ".join(choices[:_LISTED]) + (
            f" and {len(choices) - _LISTED} more" if len(choices) > _LISTED else ""
        )
        if not choices:
            raise ModelNotFoundError(f"the repository {self.repo} holds no GGUF model")
        if not found:
            raise ModelNotFoundError(f"no file of {self.repo} matches {self}; it holds: {listed}")
        raise ModelNotFoundError(f"{self} matches {len(found)} models; add :QUANT or /file.gguf for one of: {listed}")

    def folder(self, root: Path) -> Path:
        """Where the repository's files are kept under the cache folder `root`."""
        return root / "hub" / self.repo.replace("/", "--")

    def parts(self, root: Path) -> list[Path]:
        """The model's downloaded files, in order; empty unless all are here. Asks no network."""
        folder = self.folder(root)
        try:
            paths = self.select(files_here(folder))
        except ModelNotFoundError:
            return []
        count = re.search(r"-of-(\d{5})\.gguf$", paths[0], re.IGNORECASE)
        return [folder / path for path in paths] if count is None or len(paths) == int(count[1]) else []

    def cached(self, root: Path) -> Path | None:
        """The first file of an already downloaded model, or None."""
        return next(iter(self.parts(root)), None)

    def fetch(self, root: Path, progress: Progress | None = None) -> Path:
        """Download a model (every part of a split one) and return its first file.

        An interrupted download goes on where it stopped. Size and, where the hub states it, sha256 are checked before
        a file is put in place.

        Raises:
            ModelNotFoundError: no such repository or file, no access, or an ambiguous name.
            DownloadError: no network, no space, or damaged content.
        """
        revision, files = _listing(self)
        folder = self.folder(root)
        work = folder / ".download"
        store.make_private(folder)
        store.make_private(work)
        arriving = {_part_path(work, file) for file in files}
        for leftover in set(work.iterdir()) - arriving:  # partial files of other models or revisions
            leftover.unlink()
        missing = [file for file in files if not _complete(folder / file.path, file)]
        needed = sum(file.size for file in missing) - sum(part.stat().st_size for part in arriving if part.exists())
        with store.disk_errors(folder, needed, str(self)):
            store.require_space(folder, needed, str(self))
            for file in missing:
                _fetch_file(self, revision, file, _part_path(work, file), folder / file.path, progress)
            shutil.rmtree(work)
        return folder / files[0].path


@dataclass(frozen=True)
class _RemoteFile:
    path: str
    size: int
    sha256: str | None


def files_here(folder: Path) -> list[str]:
    """The complete GGUF files under a repository's folder, as paths in the repository."""
    paths = [path.relative_to(folder) for path in folder.rglob("*.gguf")]
    return [path.as_posix() for path in paths if ".download" not in path.parts]


def _complete(path: Path, file: _RemoteFile) -> bool:
    """Whether `path` already holds this version of a file (a part of another revision must not be mixed in)."""
    if not path.exists() or path.stat().st_size != file.size:
        return False
    return file.sha256 is None or store.hash_file(path).hexdigest() == file.sha256


def _part_path(work: Path, file: _RemoteFile) -> Path:
    """Where the bytes of one version of a file arrive: named by content, so another version never continues it."""
    return work / f"{file.path.replace('/', '--')}.{(file.sha256 or 'unhashed')[:16]}.part"


def _listing(name: HubName) -> tuple[str, list[_RemoteFile]]:
    """The commit and the files that `name` means, from the hub."""
    from huggingface_hub import HfApi

    info = _ask(name, lambda: HfApi().model_info(name.repo, files_metadata=True, timeout=_TIMEOUT_SECONDS))
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    files = []
    for path in name.select(list(siblings)):
        if not _SAFE_PATH.fullmatch(path):  # comes from a server: must not point outside the cache
            raise DownloadError(f"the hub lists a file with the unusable name {path!r} in {name.repo}")
        lfs = siblings[path].lfs
        size = lfs.size if lfs else siblings[path].size
        if size is None or not info.sha:
            raise DownloadError(f"the hub gives no size or commit for {path} of {name.repo}")
        files.append(_RemoteFile(path, size, lfs.sha256 if lfs else None))
    return info.sha, files


def _fetch_file(
    name: HubName, revision: str, file: _RemoteFile, part: Path, target: Path, progress: Progress | None
) -> None:
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(name.repo, file.path, revision=revision)
    what = f"downloading {PurePosixPath(file.path).name}"
    failures = 0
    while True:
        start = part.stat().st_size if part.exists() else 0
        if start >= file.size:
            break
        try:
            _ask(name, lambda: _append(url, part, file.size, what, progress))
        except DownloadError:
            # A dropped connection is taken up again, without end as long as bytes arrive.
            arrived = part.exists() and part.stat().st_size > start
            failures = 0 if arrived else failures + 1
            if not part.exists() or failures == _RETRIES:
                raise
            time.sleep(failures)
    digest = store.hash_file(part).hexdigest()
    store.verify(part, part.stat().st_size, digest, file.size, file.sha256, file.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    store.put_in_place(part, target)


def _append(url: str, part: Path, total: int, what: str, progress: Progress | None) -> None:
    """Request what is missing of `part` and append it; a server that ignores the range starts it anew."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    start = part.stat().st_size if part.exists() else 0
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    # The session drops the login when it follows the hub's redirect to another host.
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {start}-"
        )
        done = start if resumed else 0
        with part.open("ab" if resumed else "wb") as out:
            for block in response.iter_bytes(_CHUNK):
                out.write(block)
                done += len(block)
                if done > total:  # a lying server must not fill the disk
                    break
                if progress is not None:
                    progress(what, done, total)
            out.flush()
            os.fsync(out.fileno())


def _ask(name: HubName, request: Any) -> Any:
    """Run a request to the hub, its failures as one-line errors.

    Raises:
        ModelNotFoundError: the hub knows no such repository or file, or refuses access.
        DownloadError: the hub cannot be reached or failed.
    """
    from huggingface_hub import errors

    # HfHubHTTPError derives from the HTTP client's own base error, whichever client this version is built on.
    transport: Any = errors.HfHubHTTPError.__bases__
    try:
        return request()
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"the repository {name.repo} is gated: accept its terms on its page and log in (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"the hub has no repository {name.repo}, or it is private and needs a login (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelNotFoundError(f"the hub has no file {name}") from error
    except errors.OfflineModeIsEnabled as error:
        raise DownloadError(f"{name} is not in the cache, and HF_HUB_OFFLINE forbids asking the hub") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise DownloadError(f"the hub refused {name} with HTTP status {status}") from error
    except transport as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk's, not the network's: the caller turns it into a typed error
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DownloadError(
            f"the Hugging Face hub cannot be reached for {name} (is there a network?): {said}"
        ) from error
