"""Jobs of several processes: process 0 runs the host loop and tells the others, which follow, what to run.

Every process has its part of each model, and all run the same programs in the same order; what is drawn, scheduled and
decided stays in process 0.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax

from realm_jax.checkpoint import open_model
from realm_jax.engine.compile_cache import enable_compile_cache
from realm_jax.engine.executor import Batch, Executor
from realm_jax.errors import AdapterError, ClusterError, RealmError
from realm_jax.lora import Adapter, weight_shapes
from realm_jax.lora.reading import read_adapter
from realm_jax.lora.stacks import DeviceStacks
from realm_jax.model import load_model
from realm_jax.registry import resolve
from realm_jax.sharding.link import Link, Message
from realm_jax.sharding.mesh import MeshShape

_EDGE = 1 << 20  # bytes at each end of a file that tell it from another


@cache
def _link() -> Link:
    """This process's only one: messages are numbered."""
    return Link()


class Leader:
    """What process 0 has of one model that others follow."""

    def __init__(self, model: str | Path, path: Path, **options: Any):
        """Has all others load a model. model: as the user named it; path: what that was here; options: see _open."""
        self._link = _link()
        self._id = self._link.new_id()
        self._broken = False
        self._process = os.getpid()
        name = str(path.resolve()) if os.path.exists(model) else str(model)
        self.tell("open", model=name, fingerprint=fingerprint(path), **options)

    def tell(self, kind: str, **fields: Any) -> None:
        """To all others, about this model. ClusterError once they have been told what was not done here."""
        if self._broken:
            raise ClusterError("process 0 failed in a step that the others ran: start the job again")
        self._link.tell(kind, model_id=self._id, **fields)

    @contextmanager
    def told(self, kind: str, **fields: Any) -> Iterator[None]:
        """Tells, and does the same here meanwhile; to be left when it is on its way: devices must get all programs in
        one order. If it fails, nothing more is told: others' collectives would meet with another step's of ours."""
        with self._link.turn:
            self.tell(kind, **fields)
            try:
                yield
            except BaseException:
                self._broken = True
                raise

    def share(self, content: str, source: str) -> None:
        """Has all others read an adapter. AdapterError with what keeps one of them from it."""
        self.tell("adapter", content=content, source=source)
        for rank, problem in self._link.answers(f"adapter-{self._id}-{content}").items():
            if problem:
                raise AdapterError(f"rank {rank}: {problem}")

    def reset(self) -> None:
        """Has all others forget their pools, as after a failed step."""
        if not self._broken:
            self.tell("reset")

    def close(self) -> None:
        """Has all others let go of the model. Nothing in a fork of process 0, which has no part in the job."""
        if not self._broken and os.getpid() == self._process:
            self.tell("close")

    def meet(self) -> None:
        """Waits for all others, after compiling."""
        self._link.meet()

    def wait(self) -> None:
        """Until all others have loaded it. ClusterError with what kept one of them."""
        for rank, problem in self._link.answers(f"open-{self._id}").items():
            if problem:
                raise ClusterError(f"rank {rank}: {problem}")


def follow() -> None:
    """Does what process 0 tells, until it has closed all its models. RealmError, and anything a device may raise."""
    link = _link()
    jax.devices()  # which all processes find together
    followed: dict[int, _Followed] = {}
    while True:
        message = link.hear()
        number = message["model_id"]
        if message["kind"] == "open":
            try:
                followed[number] = _open(message, link)
            except RealmError as error:
                link.answer(f"open-{number}", str(error))
            else:
                link.answer(f"open-{number}", "")
        elif message["kind"] == "close":
            followed.pop(number, None)
            if not followed:
                return
        elif number in followed:  # not of one that was closed meanwhile, or could not be opened
            followed[number].do(message)


def fingerprint(path: Path) -> str:
    """Of a model's file, or its folder's index: the same in all processes, or they would compute with other weights."""
    file = path / "realm.json" if path.is_dir() else path
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as data:
        size = os.fstat(data.fileno()).st_size
        digest.update(data.read(_EDGE))
        data.seek(max(0, size - _EDGE))
        digest.update(data.read(_EDGE))
    return f"{size}-{digest.hexdigest()}"


class _Followed:
    """One model in a process that follows."""

    def __init__(self, model: Any, number: int, link: Link):
        self._model = model
        self._number = number
        self._link = link
        self._reader = ThreadPoolExecutor(1)  # of adapters: steps go on meanwhile
        self._shapes = weight_shapes(model)
        self._executor: Executor | None = None
        self._adapters: dict[str, Future[Adapter]] = {}
        self._stacks: DeviceStacks | None = None
        self._slots = 0

    def do(self, message: Message) -> None:
        getattr(self, f"_{message['kind']}")(**{k: v for k, v in message.items() if k not in ("kind", "model_id")})

    def _serve(self, max_batch: int, num_pages: int) -> None:
        enable_compile_cache()
        self._slots = max_batch
        self._executor = Executor(self._model, max_batch=max_batch, num_pages=num_pages, meet=_link().meet)

    def _run(self, wanted: Any, batch: list[Any]) -> None:
        assert self._executor is not None
        self._executor.run(wanted, Batch(*batch), None, self._stacks_of(batch))

    def _compile(self, wanted: Any, batch: list[Any]) -> None:
        assert self._executor is not None
        self._executor.compile(wanted, Batch(*batch), self._stacks_of(batch))

    def _reset(self) -> None:
        assert self._executor is not None
        self._executor.pool = None

    def _stacks_of(self, batch: list[Any]) -> Any:
        return None if batch[-1] is None or self._stacks is None else self._stacks.stacks

    def _adapter(self, content: str, source: str) -> None:
        self._adapters[content] = self._reader.submit(self._read, content, source)

    def _read(self, content: str, source: str) -> Adapter:
        question = f"adapter-{self._number}-{content}"
        try:
            adapter = self._checked(content, source)
        except Exception as error:
            self._link.answer(question, str(error) or type(error).__name__)
            raise
        self._link.answer(question, "")
        return adapter

    def _checked(self, content: str, source: str) -> Adapter:
        adapter = read_adapter(source, self._model.config, self._shapes)
        if adapter.content_hash.hex() != content:
            raise AdapterError(
                f"adapter {source}: process {jax.process_index()} reads another one there than process 0"
            )
        return adapter

    def _forget(self, content: str) -> None:
        self._adapters.pop(content, None)

    def _make_stacks(self, rank: int, roles: list[str]) -> None:
        self._stacks = None  # before there are new ones: both may not fit
        self._stacks = DeviceStacks(self._slots, self._model, self._shapes, rank, roles)

    def _drop_stacks(self) -> None:
        self._stacks = None

    def _write(self, slot: int, content: str, scale: float) -> None:
        assert self._stacks is not None
        self._stacks.write(slot, self._adapters[content].result(), scale)


def _open(message: Message, link: Link) -> _Followed:
    path = resolve(message["model"])
    if fingerprint(Path(path)) != message["fingerprint"]:
        raise ClusterError(f"{path} is not the file that process 0 has")
    with open_model(path) as file:
        mesh = MeshShape.parse(message["mesh"])
        model = load_model(file, message["context_length"], backend=message["backend"], mesh=mesh)
        return _Followed(model, message["model_id"], link)
