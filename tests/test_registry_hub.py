"""The Hugging Face hub as a source, against a small server that speaks its protocol: listing, ranges, login, failures.

Each case runs `realm models ...` in a process of its own, because huggingface_hub reads its endpoint when imported.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "c0ffee" + "0" * 34
BLOCK = bytes(range(256)) * 4096  # 1 MB
FILES = {
    "README.md": b"hello",
    "tiny-Q4_0.gguf": b"GGUF4" + BLOCK * 3,
    "tiny-Q8_0-00001-of-00002.gguf": b"GGUF8" + BLOCK,
    "tiny-Q8_0-00002-of-00002.gguf": b"8GGUF" + BLOCK,
}


class Hub:
    """What the server holds and how it misbehaves; `requests` lists (path, Range header, status)."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.requests: list[tuple[str, str | None, int]] = []
        self.cut_after: int | None = None  # of the next file's body, once
        self.ignore_ranges = False
        self.token: str | None = None
        self.listing_status = 200
        self.sha256_of: Callable[[bytes], str] = lambda data: hashlib.sha256(data).hexdigest()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        path = request.path.split("?")[0]
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            self._send(request, path, asked, 401, b"", {"X-Error-Code": "GatedRepo"})
        elif path == "/api/models/org/tiny":
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": "0" * 40}
                | (
                    {"lfs": {"size": len(data), "sha256": self.sha256_of(data), "pointerSize": 1}}
                    if len(data) > 9
                    else {}
                )
                for name, data in self.files.items()
            ]
            body = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
            self._send(request, path, asked, self.listing_status, body, {"Content-Type": "application/json"})
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/") and path.rsplit("/", 1)[1] in self.files:
            body = self.files[path.rsplit("/", 1)[1]]
            start = re.fullmatch(r"bytes=(\d+)-", asked or "")
            if start and not self.ignore_ranges:
                at = int(start[1])
                headers = {"Content-Range": f"bytes {at}-{len(body) - 1}/{len(body)}"}
                self._send(request, path, asked, 206, body[at:], headers)
            else:
                self._send(request, path, asked, 200, body, {})
        else:
            self._send(request, path, asked, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def _send(
        self, request: BaseHTTPRequestHandler, path: str, asked: str | None, status: int, body: bytes, headers: dict
    ) -> None:
        self.requests.append((path, asked, status))
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(name, value)
        request.end_headers()
        if self.cut_after is not None and path.endswith(".gguf"):
            body, self.cut_after = body[: self.cut_after], None
        request.wfile.write(body)

    def downloads(self) -> list[tuple[str, str | None, int]]:
        return [(path.rsplit("/", 1)[1], asked, status) for path, asked, status in self.requests if "/resolve/" in path]


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def realm(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `realm models` with the fake hub and a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "REALM_CACHE": str(tmp_path / "cache"),
        "NO_PROXY": "127.0.0.1",
    }

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "realm_jax.cli", "models", *arguments]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=100)

    return run


Realm = Callable[..., "subprocess.CompletedProcess[str]"]


def files_under(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_pull_list_remove(hub: Hub, realm: Realm, tmp_path: Path) -> None:
    done = realm("pull", "org/tiny:q4_0")
    path = tmp_path / "cache/hub/org--tiny/tiny-Q4_0.gguf"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
    assert path.read_bytes() == FILES["tiny-Q4_0.gguf"]
    before = len(hub.requests)
    assert realm("pull", "org/tiny:Q4_0").stdout == realm("path", "org/tiny/tiny-Q4_0.gguf").stdout == f"{path}\n"
    assert len(hub.requests) == before  # what is here asks no network
    rows = json.loads(realm("list", "--json").stdout)["models"]
    assert {row["name"]: row["size"] for row in rows if row["path"]} == {"org/tiny/tiny-Q4_0.gguf": 3145733}
    assert realm("remove", "org/tiny:Q4_0").returncode == 0
    assert files_under(tmp_path / "cache") == []


def test_every_part_of_a_split_model(hub: Hub, realm: Realm, tmp_path: Path) -> None:
    done = realm("pull", "org/tiny/tiny-Q8_0-00002-of-00002.gguf")
    folder = tmp_path / "cache/hub/org--tiny"
    assert done.stdout == f"{folder / 'tiny-Q8_0-00001-of-00002.gguf'}\n"
    assert files_under(folder) == ["tiny-Q8_0-00001-of-00002.gguf", "tiny-Q8_0-00002-of-00002.gguf"]


def part_of(tmp_path: Path, data: bytes) -> Path:
    """Where the Q4_0 file arrives."""
    work = tmp_path / "cache/hub/org--tiny/.download"
    work.mkdir(parents=True, exist_ok=True)
    return work / f"tiny-Q4_0.gguf.{hashlib.sha256(data).hexdigest()[:16]}.part"


def test_an_interrupted_download_goes_on(hub: Hub, realm: Realm, tmp_path: Path) -> None:
    data = FILES["tiny-Q4_0.gguf"]
    part_of(tmp_path, data).write_bytes(data[:1_000_000])
    assert realm("pull", "org/tiny:Q4_0").returncode == 0
    assert hub.downloads() == [("tiny-Q4_0.gguf", "bytes=1000000-", 206)]
    assert (tmp_path / "cache/hub/org--tiny/tiny-Q4_0.gguf").read_bytes() == data
    assert files_under(tmp_path / "cache") == ["hub/org--tiny/tiny-Q4_0.gguf"]


def test_a_dropped_connection_is_taken_up_again(hub: Hub, realm: Realm, tmp_path: Path) -> None:
    hub.cut_after = 2 << 20
    assert realm("pull", "org/tiny:Q4_0").returncode == 0
    first, second = hub.downloads()
    assert first == ("tiny-Q4_0.gguf", None, 200)
    assert second[2] == 206
    assert (tmp_path / "cache/hub/org--tiny/tiny-Q4_0.gguf").read_bytes() == FILES["tiny-Q4_0.gguf"]


def test_a_server_without_ranges_starts_anew(hub: Hub, realm: Realm, tmp_path: Path) -> None:
    hub.ignore_ranges = True
    data = FILES["tiny-Q4_0.gguf"]
    part_of(tmp_path, data).write_bytes(data[:1000])
    assert realm("pull", "org/tiny:Q4_0").returncode == 0
    assert (tmp_path / "cache/hub/org--tiny/tiny-Q4_0.gguf").read_bytes() == data


def test_the_users_token_is_sent(hub: Hub, realm: Realm) -> None:
    hub.token = "secret"
    refused = realm("pull", "org/tiny:Q4_0")
    assert refused.returncode == 2
    assert re.fullmatch(r"error: the repository org/tiny is gated: .*HF_TOKEN.*\n", refused.stderr)
    assert realm("pull", "org/tiny:Q4_0", HF_TOKEN="secret").returncode == 0


def test_damaged_content_is_refused_and_removed(hub: Hub, realm: Realm, tmp_path: Path) -> None:
    hub.sha256_of = lambda data: "0" * 64
    done = realm("pull", "org/tiny:Q4_0")
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: tiny-Q4_0.gguf was damaged on its way: sha256 [0-9a-f]{64}, not 0{64}.*\n", done.stderr
    )
    assert files_under(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, ["pull", "org/other"], "the hub has no repository org/other"),
        (None, ["pull", "org/tiny:Q5_K"], "no file of org/tiny matches org/tiny:Q5_K; it holds: tiny-Q4_0.gguf"),
        (None, ["pull", "org/tiny"], "org/tiny matches 2 models; add :QUANT or /file.gguf for one of"),
        (None, ["path", "org/tiny"], "org/tiny is not downloaded; realm models pull org/tiny fetches it"),
        (
            lambda hub: setattr(hub, "listing_status", 500),
            ["pull", "org/tiny"],
            "the hub refused org/tiny with HTTP status 500",
        ),
        (
            lambda hub: hub.files.update({"../x-Q2_K.gguf": BLOCK}),
            ["pull", "org/tiny:Q2_K"],
            "unusable name '../x-Q2_K.gguf'",
        ),
    ],
)
def test_refusals_are_one_line(
    hub: Hub, realm: Realm, tmp_path: Path, prepare: Callable[[Hub], None] | None, arguments: list[str], message: str
) -> None:
    if prepare is not None:
        prepare(hub)
    done = realm(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert files_under(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hugging Face hub cannot be reached for org/tiny"),
        ({"HF_HUB_OFFLINE": "1"}, "org/tiny is not in the cache, and HF_HUB_OFFLINE forbids asking the hub"),
    ],
)
def test_no_network_is_one_line(realm: Realm, setting: dict[str, str], message: str) -> None:
    done = realm("pull", "org/tiny", **setting)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
