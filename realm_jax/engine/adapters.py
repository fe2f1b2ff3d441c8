"""The adapters that requests hold, which come and go while others run."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from realm_jax.engine.request import Request
from realm_jax.engine.tenants import Tenant
from realm_jax.errors import AdapterError, RealmError
from realm_jax.interrupt import interrupt_deferred
from realm_jax.lora import AdapterStore, Resident
from realm_jax.sampling_params import shown

T = TypeVar("T")


class RequestAdapters:
    """An AdapterStore under a lock, for several threads. Without one, every use is a RealmError."""

    def __init__(self, store: AdapterStore | None):
        self._store = store
        self._lock = threading.RLock()

    @property
    def names(self) -> tuple[str, ...]:
        """Of those loaded."""
        with self._lock:
            return () if self._store is None else tuple(self._store.names)

    def load(self, name: str, path: Any, scale: float, check_open: Callable[[], None]) -> None:
        """Loads or replaces an adapter: who holds the old one keeps it. AdapterError, and what check_open raises."""
        check_open()
        store = self._loaded()
        adapter = store.read(path)  # takes long: outside the lock
        with interrupt_deferred(), self._lock:
            check_open()
            store.add(name, adapter, scale)

    def unload(self, name: str) -> None:
        """AdapterError for one that is not loaded."""
        with interrupt_deferred(), self._lock:
            self._loaded().unload(name)

    def check(self, name: str) -> None:
        """AdapterError when there is none of that name."""
        with self._lock:
            self._loaded().get(name)

    @contextmanager
    def held(self, name: str) -> Iterator[Resident]:
        """An adapter, held meanwhile; others wait to load theirs."""
        store = self._loaded()
        with self._lock:
            handle = store.acquire(name)
            try:
                yield handle
            finally:
                store.release(handle)

    def with_placed(self, name: str, work: Callable[[Any], T]) -> T:
        """work((stacks, slot)) with an adapter on the device; to be called while driving exclusively."""
        with self.held(name) as handle:
            store = self._loaded()
            [slot] = store.place([(handle, 1.0)])
            return work((store.stacks, int(slot)))

    @contextmanager
    def stacks(self) -> Iterator[Any]:
        """The stacks of the device, None while no adapter is loaded. In a job, others wait to load theirs meanwhile."""
        with self._lock:
            stacks = None if self._store is None else self._store.stacks
            if self._store is not None and self._store.shared:
                yield stacks
                return
        yield stacks

    @contextmanager
    def placed(self, owners: Sequence[Request]) -> Iterator[tuple[Any, np.ndarray | None]]:
        """Stacks and the slot of each row; no stacks where no row has an adapter: the program without them serves. In a
        job, others wait to load theirs meanwhile: all processes are to use the same stacks."""
        if all(request.adapter is None for request in owners):
            yield None, None
            return
        store = self._loaded()
        with self._lock:
            slots = store.place([None if r.adapter is None else (r.adapter, r.adapter_scale) for r in owners])
            stacks = store.stacks
            if store.shared:
                yield stacks, slots
                return
        yield stacks, slots

    def pin(self, request: Request, tenant: Tenant) -> None:
        """Has a request hold the adapter that it names. AdapterError where there is none that its tenant may use."""
        name = request.adapter_name
        assert name is not None
        tenant.check_adapter(name)
        with self._lock:
            store = self._loaded()
            if tenant.adapters is not None and name not in store.names:  # the others' names are not its business
                loaded = ", ".join(repr(one) for one in tenant.adapters if one in store.names) or "none"
                raise AdapterError(f"there is no adapter {shown(name)} now; loaded for {tenant.name!r} are: {loaded}")
            request.use_adapter(store.acquire(name))

    def unpin(self, request: Request) -> None:
        assert request.adapter is not None
        with self._lock:
            self._loaded().release(request.adapter)
        request.adapter = None

    def _loaded(self) -> AdapterStore:
        if self._store is None:
            raise RealmError("this loop was made without adapters")
        return self._store
