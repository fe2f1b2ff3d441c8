"""The adapters of one model: all of them on the host, those in use on the device.

Not for several threads at once: the host loop owns it.
"""

import hashlib
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import jax
import numpy as np

from realm_jax.errors import AdapterError, CapacityError, InvalidRequestError
from realm_jax.lora.adapter import Adapter, weight_shapes
from realm_jax.lora.reading import read_adapter
from realm_jax.lora.stacks import DeviceStacks, Signature, rank_bucket
from realm_jax.model.adapters import Stack
from realm_jax.model.params import Model
from realm_jax.sampling_params import shown

SlotKey = tuple[bytes, float]  # content and scale


class Others(Protocol):
    """What a store needs of the other processes of a job."""

    def tell(self, kind: str, **fields: Any) -> None: ...

    def share(self, content: str, source: str) -> None: ...


class Resident:
    """One loaded adapter, as requests hold it: it outlives its name while they do.

    name: it was loaded under; adapter: its content; scale: of all its uses; holders: how many have acquired it.
    """

    def __init__(self, name: str, adapter: Adapter, scale: float) -> None:
        self.name = name
        self.adapter = adapter
        self.scale = scale
        self.holders = 0

    @property
    def content_hash(self) -> bytes:
        return self.adapter.content_hash

    def cache_key(self, scale: float = 1.0) -> bytes:
        """32 bytes that differ wherever the adapter, at a request's scale, computes anything else."""
        effective = struct.pack("<f", self.effective(scale))
        return hashlib.blake2b(self.content_hash + effective, digest_size=32).digest()

    def effective(self, scale: float) -> float:
        """What the adapter's own scale and a request's make together, a float32."""
        with np.errstate(over="ignore"):
            return float(np.float32(self.scale * scale))


class AdapterStore:
    """Loaded adapters by name, and the slots of the device."""

    def __init__(self, model: Model, *, device_slots: int, others: Others | None = None) -> None:
        """Allocates nothing on the device before the first adapter is loaded.

        Args:
            model: the base.
            device_slots: how many different adapters, or scales of them, one batch can hold.
            others: the processes of a job whose stacks must do the same; see engine.follower.

        Raises:
            InvalidRequestError: no slots.
        """
        if isinstance(device_slots, bool) or not isinstance(device_slots, int) or device_slots < 1:
            raise InvalidRequestError(f"device_slots is {device_slots!r}; a number of at least 1 is accepted")
        self.device_slots = device_slots
        self._others = others
        self._sharing = threading.Lock()
        self._told: set[bytes] = set()  # contents that the other processes have
        self._expected: set[bytes] = set()  # of adapters that were read and not added yet
        self._model = replace(model, params=None)  # type: ignore[arg-type]  # weights are swapped, and not ours to keep
        self._config = model.config
        self._shapes = weight_shapes(model)
        self._named: dict[str, Resident] = {}
        self._unnamed: set[Resident] = set()  # replaced or unloaded, and still held
        self._device: DeviceStacks | None = None
        self._slots: OrderedDict[SlotKey, int] = OrderedDict()  # what the slots hold, least recently used first

    @property
    def names(self) -> list[str]:
        return sorted(self._named)

    @property
    def stacks(self) -> dict[str, Stack] | None:
        """For RowAdapters; None while there is no adapter. Good until the next `load`, `unload`, `release` or `place`,
        which may write them in place: ask after `place`, for every step."""
        return None if self._device is None else self._device.stacks

    @property
    def signature(self) -> Signature | None:
        """Changes exactly when the shapes of `stacks` do, and programs must be compiled again."""
        return None if self._device is None else self._device.signature

    @property
    def host_bytes(self) -> int:
        """Of all adapters that are loaded or held, contents that are there twice counted once."""
        return sum({r.content_hash: r.adapter.nbytes for r in (*self._named.values(), *self._unnamed)}.values())

    @property
    def device_bytes(self) -> int:
        return 0 if self._device is None else self._device.nbytes

    def load(self, name: str, path: str | os.PathLike[str], scale: float = 1.0) -> Resident:
        """Reads an adapter and gives it a name, in place of what had the name before: who holds that keeps it.

        Raises AdapterError (see read_adapter), after which nothing has changed, and InvalidRequestError for a name or
        scale that cannot be.
        """
        return self.add(name, self.read(path), scale)

    def read(self, path: str | os.PathLike[str]) -> Adapter:
        """The adapter in a file or folder (see read_adapter). Changes nothing, and may run on any thread."""
        adapter = read_adapter(path, self._config, self._shapes)
        content = adapter.content_hash  # which takes its time, and is kept
        if self._others is not None:
            with self._sharing:
                self._expected.add(content)
                if content not in self._told:
                    self._others.share(content.hex(), adapter.source)
                    self._told.add(content)
        return adapter

    @property
    def shared(self) -> bool:
        """Whether other processes have the same stacks: what is placed must be on its way before others change them."""
        return self._others is not None

    def add(self, name: str, adapter: Adapter, scale: float = 1.0) -> Resident:
        """As `load`, of an adapter that `read` gave."""
        if not isinstance(name, str) or not name:
            raise InvalidRequestError(f"an adapter's name is {shown(name)}; a text that is not empty is accepted")
        resident = Resident(name, self._shared(adapter), check_scale(scale))
        self._make_room(resident.adapter)
        self._drop(name)
        self._named[name] = resident
        self._expected.discard(adapter.content_hash)
        self._tell_contents()
        return resident

    def unload(self, name: str) -> None:
        """Takes the name away; who holds the adapter keeps it. AdapterError when there is none of that name."""
        self.get(name)
        self._drop(name)
        self._free_if_empty()

    def get(self, name: str) -> Resident:
        """The adapter that has a name now, not acquired. AdapterError when there is none."""
        try:
            return self._named[name]
        except (KeyError, TypeError):
            raise AdapterError(
                f"there is no adapter {shown(name)}; loaded are: {', '.join(map(repr, self.names)) or 'none'}"
            ) from None

    def acquire(self, name: str) -> Resident:
        """As `get`, and held until it is released."""
        resident = self.get(name)
        resident.holders += 1
        return resident

    def release(self, resident: Resident) -> None:
        """Gives back what `acquire` returned, once for each time."""
        if resident.holders < 1:
            raise ValueError(f"adapter {resident.name!r} is released more often than it was acquired")
        resident.holders -= 1
        if not resident.holders and resident in self._unnamed:
            self._unnamed.remove(resident)
            self._free_if_empty()

    def place(self, rows: Sequence[tuple[Resident, float] | None]) -> np.ndarray:
        """Brings the adapters of a batch onto the device.

        Args:
            rows: for each row an adapter, loaded or held, and the request's scale; or None.

        Returns:
            int32 [rows], each row's slot in `stacks`; -1 for none, and where the scales make 0.

        Raises:
            CapacityError: more different pairs of an adapter and a scale than slots; nothing has changed then.
            InvalidRequestError: a scale that cannot be.
        """
        wanted: dict[SlotKey, Resident] = {}
        keys: list[SlotKey | None] = []
        for row in rows:
            key = None
            if row is not None:
                resident, scale = row
                effective = resident.effective(check_scale(scale))
                if effective:
                    key = (resident.content_hash, effective)
                    wanted[key] = resident
            keys.append(key)
        if len(wanted) > self.device_slots:
            raise CapacityError(
                f"{len(wanted)} different adapters or scales of them in one batch; the device holds {self.device_slots}"
            )
        for key in wanted:
            if key in self._slots:
                self._slots.move_to_end(key)
        for key, resident in wanted.items():
            if key not in self._slots:
                self._bring(key, resident, wanted)
        return np.array([-1 if key is None else self._slots[key] for key in keys], np.int32)

    def _bring(self, key: SlotKey, resident: Resident, pinned: dict[SlotKey, Resident]) -> None:
        assert self._device is not None
        if len(self._slots) < self.device_slots:
            slot = next(i for i in range(self.device_slots) if i not in self._slots.values())
        else:
            slot = self._slots.pop(next(old for old in self._slots if old not in pinned))
        if self._others is not None:
            self._others.tell("write", slot=slot, content=resident.content_hash.hex(), scale=key[1])
        self._device.write(slot, resident.adapter, key[1])
        self._slots[key] = slot

    def _shared(self, adapter: Adapter) -> Adapter:
        """An equal adapter that is there already, else this one."""
        for other in (*self._named.values(), *self._unnamed):
            if other.content_hash == adapter.content_hash:
                return other.adapter
        return adapter

    def _make_room(self, adapter: Adapter) -> None:
        """Makes larger stacks where an adapter does not fit; what is in use is brought there when it is next placed."""
        if self._device is not None and self._device.holds(adapter):
            return
        old = self.signature
        rank, roles = rank_bucket(adapter.rank), set(adapter.roles)
        if old is not None:
            rank, roles = max(rank, old[0]), roles.union(old[1])
        self._slots.clear()
        self._device = None  # before there are new ones: both may not fit
        try:
            self._device = self._allocate(rank, roles)
        except jax.errors.JaxRuntimeError as error:
            if old is not None:
                self._device = self._allocate(*old)
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise CapacityError(
                f"out of memory for {self.device_slots} adapters of rank {rank}; fewer slots or a lower rank need less"
            ) from error

    def _allocate(self, rank: int, roles: Iterable[str]) -> DeviceStacks:
        if self._others is not None:
            self._others.tell("make_stacks", rank=rank, roles=sorted(roles))
        return DeviceStacks(self.device_slots, self._model, self._shapes, rank, roles)

    def _drop(self, name: str) -> None:
        old = self._named.pop(name, None)
        if old is not None and old.holders:
            self._unnamed.add(old)

    def _free_if_empty(self) -> None:
        if not self._named and not self._unnamed:
            self._device = None
            self._slots.clear()
            if self._others is not None:
                self._others.tell("drop_stacks")
        self._tell_contents()

    def _tell_contents(self) -> None:
        """What the other processes need no longer."""
        if self._others is None:
            return
        held = {r.content_hash for r in (*self._named.values(), *self._unnamed)}
        with self._sharing:
            for content in self._told - held - self._expected:
                self._others.tell("forget", content=content.hex())
                self._told.discard(content)


def check_scale(scale: float) -> float:
    """An adapter's scale as a float. Raises InvalidRequestError unless it is a finite number."""
    number = isinstance(scale, (int, float, np.integer, np.floating)) and not isinstance(scale, bool)
    if not number or not abs(scale) <= 1e6:
        raise InvalidRequestError(f"an adapter's scale is {shown(scale)}; a number from -1e6 to 1e6 is accepted")
    return float(scale)
