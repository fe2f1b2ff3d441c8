"""Between the processes of a job: what the first one tells the others, through the coordination service's store.

The service is JAX's own (jax.distributed), and so are its transport and its heartbeats. Messages are numbered; every
process reads every one of them in order.
"""

import itertools
import threading
import time
from typing import Any, NoReturn

import jax
from flax import serialization
from jax._src import distributed  # the store of the coordination service has no public name

from realm_jax.errors import ClusterError

# Messages between two acknowledgements: what is older than two of them is deleted.
_BLOCK = 512
_WAIT_MS = 10_000
_MEETING_MS = 3_600_000  # of processes that compile; those that die are found by their supervisors

Message = dict[str, Any]  # of numpy arrays, numbers, texts, None, and dicts and lists of them


class Link:
    """One process's end. Process 0 tells, the others listen and may answer questions of it."""

    def __init__(self) -> None:
        """Raises ClusterError in a process that is in no job."""
        client = distributed.global_state.client
        if client is None:
            raise ClusterError("this process is in no job of several; scripts/launch_sharded.py starts one")
        self._client = client
        self._lock = threading.Lock()
        self._number = 0
        self._meetings = 0
        self._ids = itertools.count()
        # Held from telling of a program to its being on its way: devices must get all programs in the same order.
        self.turn = threading.RLock()

    def tell(self, kind: str, **fields: Any) -> None:
        """Sends a message to all others; may be called from any thread."""
        data = serialization.msgpack_serialize({"kind": kind, **fields})
        with self._lock:
            self._client.key_value_set_bytes(_message_key(self._number), data)
            self._number += 1
            if self._number % _BLOCK == 0:
                self._forget(self._number // _BLOCK - 2)

    def hear(self) -> Message:
        """The next message; waits as long as it takes."""
        data = self._get(_message_key(self._number))
        self._number += 1
        if self._number % _BLOCK == 0:
            self._client.key_value_set_bytes(_read_key(self._number // _BLOCK - 1, jax.process_index()), b"")
        return serialization.msgpack_restore(data)

    def new_id(self) -> int:
        """A number that this process has not had yet."""
        return next(self._ids)

    def meet(self) -> None:
        """Waits until all processes have come here as often as this one."""
        self._meetings += 1
        self._client.wait_at_barrier(f"realm/meeting/{self._meetings}", _MEETING_MS)

    def answer(self, question: str, text: str) -> None:
        """What `answers` gives process 0 for this process."""
        self._client.key_value_set_bytes(f"realm/answers/{question}/{jax.process_index()}", text.encode())

    def answers(self, question: str) -> dict[int, str]:
        """The answers of all other processes, by rank; waits for them."""
        found = {}
        for rank in range(1, jax.process_count()):
            found[rank] = self._get(f"realm/answers/{question}/{rank}").decode()
        self._client.key_value_delete(f"realm/answers/{question}/")
        return found

    def _forget(self, block: int) -> None:
        """Deletes a block of messages, once everybody has read it."""
        if block < 0:
            return
        for rank in range(1, jax.process_count()):
            self._get(_read_key(block, rank))
        self._client.key_value_delete(f"realm/messages/{block}/")
        self._client.key_value_delete(f"realm/read/{block}/")

    def _get(self, key: str) -> bytes:
        while True:
            began = time.monotonic()
            try:
                return self._client.blocking_key_value_get_bytes(key, _WAIT_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() - began < _WAIT_MS / 2000:
                    _lost(error)


def _lost(error: Exception) -> NoReturn:
    raise ClusterError(f"the job's coordinator is lost: {str(error).partition(chr(10))[0]}") from error


def _message_key(number: int) -> str:
    return f"realm/messages/{number // _BLOCK}/{number}"


def _read_key(block: int, rank: int) -> str:
    return f"realm/read/{block}/{rank}"
