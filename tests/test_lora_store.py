"""The store of adapters: names, holders, slots of the device, growth, and bytes."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from random_adapters import nmse, random_adapter

from realm_jax.errors import AdapterError, CapacityError, InvalidRequestError
from realm_jax.lora import Adapter, AdapterStore, Pair, weight_shapes
from realm_jax.lora import stacks as stacks_module
from realm_jax.lora import store as store_module
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.lora.stacks import RANKS, DeviceStacks, rank_bucket
from realm_jax.model import load_model
from realm_jax.model.params import Model

ROLE = "attn_q.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "llama.gguf"
    tiny_models.write_tiny_model("llama", path)
    return load_model(path)


def adapter(model: Model, seed: int = 0, rank: int = 4, roles: tuple[str, ...] = (ROLE,), **options) -> Adapter:
    takes = {"takes": lambda place: place[0] in roles}
    return random_adapter(weight_shapes(model), rank, seed=seed, **{**takes, **options})


def delta(store: AdapterStore, slot: int, role: str = ROLE, layer: int = 0) -> np.ndarray:
    """What a slot of the device adds to a matrix, float32 [N, K]."""
    a, b, scales = (np.asarray(array, np.float32) for array in store.stacks[role])
    return scales[slot] * (b[layer, slot] @ a[layer, slot])


def product(one: Adapter, role: str = ROLE, layer: int = 0) -> np.ndarray:
    pair = one.pairs[role, layer]
    return pair.scale * (pair.b.astype(np.float32) @ pair.a.astype(np.float32))


def test_nothing_is_there_before_the_first_adapter_and_after_the_last(model: Model) -> None:
    store = AdapterStore(model, device_slots=2)
    assert (store.names, store.stacks, store.signature) == ([], None, None)
    assert (store.host_bytes, store.device_bytes) == (0, 0)
    np.testing.assert_array_equal(store.place([None, None]), [-1, -1])
    store.add("one", adapter(model))
    held = store.acquire("one")
    assert store.host_bytes == held.adapter.nbytes == 3 * 2 * (4 * 64 + 64 * 4)
    assert store.device_bytes == 3 * 2 * (2 * (8 * 64 + 64 * 8)) + 2 * 4  # two slots of rank 8, and their scales
    store.unload("one")
    assert store.names == []
    assert store.host_bytes > 0  # it is still held
    assert store.place([(held, 1.0)]) == [0]
    store.release(held)
    assert (store.stacks, store.signature, store.host_bytes, store.device_bytes) == (None, None, 0, 0)
    with pytest.raises(ValueError, match="more often than it was acquired"):
        store.release(held)


def test_a_replaced_adapter_lives_until_its_last_holder_lets_go(model: Model, tmp_path: Path) -> None:
    store = AdapterStore(model, device_slots=2)
    old, new = adapter(model, 0), adapter(model, 1)
    for i, one in enumerate((old, new)):
        write_gguf(one, tmp_path / f"{i}.gguf", 8.0)
    store.load("name", tmp_path / "0.gguf")
    first, again = store.acquire("name"), store.acquire("name")
    store.load("name", tmp_path / "1.gguf")
    second = store.acquire("name")
    assert first is again
    assert first.content_hash == old.content_hash != second.content_hash == new.content_hash
    assert first.cache_key() != second.cache_key()
    slots = store.place([(first, 1.0), (second, 1.0)])
    assert nmse(product(old), delta(store, slots[0])) < 1e-12
    assert nmse(product(new), delta(store, slots[1])) < 1e-12
    assert store.host_bytes == old.nbytes + new.nbytes
    store.release(first)
    assert store.host_bytes == old.nbytes + new.nbytes
    store.release(again)
    assert store.host_bytes == new.nbytes
    store.release(second)
    assert store.names == ["name"]


def test_equal_contents_share_their_place(model: Model) -> None:
    store = AdapterStore(model, device_slots=1)
    one, two = store.add("one", adapter(model)), store.add("two", adapter(model))
    assert one.adapter is two.adapter
    assert store.host_bytes == one.adapter.nbytes
    np.testing.assert_array_equal(store.place([(one, 1.0), (two, 1.0), None]), [0, 0, -1])


def test_a_scale_of_a_request_takes_a_slot_and_a_cache_key_of_its_own(model: Model) -> None:
    store = AdapterStore(model, device_slots=3)
    one = store.add("one", adapter(model), scale=2.0)
    slots = store.place([(one, 1.0), (one, 0.5), (one, 1.0), (one, -1.0), (one, 0.0)])
    assert len({*slots}) == 4
    assert slots[0] == slots[2]
    assert slots[4] == -1  # nothing is added: as without an adapter
    for slot, scale in zip(slots, (2.0, 1.0, 2.0, -2.0)):
        assert nmse(scale * product(one.adapter), delta(store, slot)) < 1e-12
    assert len({one.cache_key(s) for s in (1.0, 0.5, -1.0, 0.0)}) == 4
    other = store.add("other", adapter(model), scale=1.0)
    assert other.cache_key(2.0) == one.cache_key(1.0)
    with pytest.raises(CapacityError, match="4 different adapters or scales of them in one batch; the device holds 3"):
        store.place([(one, float(s)) for s in range(1, 5)])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 2e6, 10**400, "1", None, True])
def test_scales_that_are_refused(scale, model: Model) -> None:
    store = AdapterStore(model, device_slots=1)
    with pytest.raises(InvalidRequestError, match=r"an adapter's scale is .*; a number from -1e6 to 1e6"):
        store.add("one", adapter(model), scale=scale)
    one = store.add("one", adapter(model))
    with pytest.raises(InvalidRequestError, match="an adapter's scale is"):
        store.place([(one, scale)])


def test_the_least_recently_used_gives_way_but_not_to_its_own_batch(model: Model, monkeypatch) -> None:
    written: list[bytes] = []
    write = DeviceStacks.write

    def counted(self, slot, one, scale):
        written.append(one.content_hash)
        write(self, slot, one, scale)

    monkeypatch.setattr(DeviceStacks, "write", counted)
    store = AdapterStore(model, device_slots=3)
    a, b, c, d = (store.add(str(i), adapter(model, i)) for i in range(4))
    at = {}
    for batch, misses in (
        ([a, b, c], [a, b, c]),
        ([a, a, None], []),
        ([d], [d]),  # b was used longest ago, in the order of its batch
        ([a, c], []),
        ([b, d], [b]),  # a, c and d are there, and d is needed
        ([b, c, d], []),
    ):
        written.clear()
        rows = [None if one is None else (one, 1.0) for one in batch]
        slots = store.place(rows)
        assert written == [one.content_hash for one in misses]
        for one, slot in zip(batch, slots):
            if one is not None:
                at[one] = slot
                assert nmse(product(one.adapter), delta(store, slot)) < 1e-12
    assert sorted(at[one] for one in (b, c, d)) == [0, 1, 2]


def test_stacks_grow_with_rank_and_roles_and_their_signature_says_so(model: Model) -> None:
    store = AdapterStore(model, device_slots=2)
    small = store.add("small", adapter(model, 0, rank=3))
    signatures = [store.signature]
    assert signatures == [(8, (ROLE,))]
    shapes = jax.tree.map(lambda x: x.shape, store.stacks)
    for name, one in (
        ("same", adapter(model, 1, rank=8)),
        ("wider", adapter(model, 2, rank=20)),
        ("narrow", adapter(model, 3, rank=1)),
        ("another role", adapter(model, 4, rank=2, roles=("ffn_down.weight", "token_embd.weight"))),
    ):
        held = store.add(name, one)
        signatures.append(store.signature)
        slots = store.place([(small, 1.0), (held, 1.0)])
        assert nmse(product(small.adapter), delta(store, slots[0])) < 1e-12
        assert (jax.tree.map(lambda x: x.shape, store.stacks) == shapes) == (signatures[-1] == signatures[-2])
        shapes = jax.tree.map(lambda x: x.shape, store.stacks)
    assert [rank for rank, _ in signatures] == [8, 8, 32, 32, 32]
    assert signatures[-1][1] == (ROLE, "ffn_down.weight", "token_embd.weight")
    last = store.get("another role").adapter
    assert not delta(store, slots[1]).any()  # it has nothing in this role
    assert nmse(product(last, "ffn_down.weight", 2), delta(store, slots[1], "ffn_down.weight", 2)) < 1e-12
    table, b, scales = (np.asarray(x, np.float32) for x in store.stacks["token_embd.weight"])
    pair = last.pairs["token_embd.weight", None]
    want = pair.scale * pair.a.astype(np.float32) @ pair.b.T.astype(np.float32)
    assert nmse(want, scales[slots[1]] * table[0, slots[1]] @ b[0, slots[1]].T) < 1e-12
    assert [rank_bucket(r) for r in (1, 8, 9, 16, 17, 256, 257, 1024)] == [8, 8, 16, 16, 32, 256, 512, 1024]
    assert sorted(RANKS) == list(RANKS)


def test_slots_are_written_in_place_by_one_program(model: Model) -> None:
    """What a slot held before is gone, even where the new adapter has less."""
    store = AdapterStore(model, device_slots=2)
    full = store.add("full", adapter(model, 0, rank=8, roles=(ROLE, "attn_v.weight")))
    less = store.add("less", adapter(model, 1, rank=2, takes=lambda place: place == (ROLE, 2)))
    store.place([(full, 1.0), (full, 2.0)])
    places = [[x.unsafe_buffer_pointer() for x in stack] for stack in store.stacks.values()]
    programs = stacks_module._write._cache_size()
    slots = store.place([(less, 1.0)])
    assert stacks_module._write._cache_size() == programs
    assert [[x.unsafe_buffer_pointer() for x in stack] for stack in store.stacks.values()] == places
    for layer in range(2):
        assert not delta(store, slots[0], layer=layer).any()
        assert not delta(store, slots[0], "attn_v.weight", layer).any()
    assert nmse(product(less.adapter, layer=2), delta(store, slots[0], layer=2)) < 1e-12


@pytest.mark.parametrize(("a", "b"), [(2.0**-20, 2.0**10), (2.0**15, 2.0**-22), (2.0**-60, 2.0**70), (0.0, 1.0)])
def test_float16_holds_large_and_small_values(a: float, b: float, model: Model) -> None:
    """Powers of two go into the scale; layers with other scales than the rest share it."""
    one = adapter(model, dtype=np.float32)
    factors = {0: 1.0, 1: -0.25, 2: 0.3}
    pairs = {
        (role, layer): Pair(pair.a * np.float32(a), pair.b * np.float32(b), pair.scale * factors[layer])
        for (role, layer), pair in one.pairs.items()
    }
    changed = Adapter("llama", pairs)
    store = AdapterStore(model, device_slots=1)
    [slot] = store.place([(store.add("one", changed), 1.0)])
    for layer in range(3):
        got, want = delta(store, slot, layer=layer), product(changed, layer=layer)
        assert np.isfinite(got).all()
        assert nmse(want, got) < 1e-7 if a else not got.any()


def test_lack_of_memory_changes_nothing(model: Model, monkeypatch) -> None:
    store = AdapterStore(model, device_slots=2)
    one = store.add("one", adapter(model))

    class Full(DeviceStacks):
        def __init__(self, slots, layers, shapes, rank, roles):
            if rank > 8:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            super().__init__(slots, layers, shapes, rank, roles)

    monkeypatch.setattr(store_module, "DeviceStacks", Full)
    signature = store.signature
    with pytest.raises(CapacityError, match="out of memory for 2 adapters of rank 64; fewer slots or a lower rank"):
        store.add("two", adapter(model, 1, rank=64))
    assert (store.names, store.signature) == (["one"], signature)
    assert nmse(product(one.adapter), delta(store, store.place([(one, 1.0)])[0])) < 1e-12


def test_names_that_are_not_there_and_arguments_that_cannot_be(model: Model, tmp_path: Path) -> None:
    store = AdapterStore(model, device_slots=1)
    with pytest.raises(AdapterError, match="there is no adapter 'x'; loaded are: none"):
        store.acquire("x")
    store.add("one", adapter(model))
    for wrong in (store.unload, store.get, store.acquire):
        with pytest.raises(AdapterError, match="there is no adapter 'x'; loaded are: 'one'"):
            wrong("x")
    with pytest.raises(AdapterError, match="no such file"):
        store.load("one", tmp_path / "none.gguf")
    assert store.get("one").adapter.content_hash == adapter(model).content_hash
    for name in ("", None, 3):
        with pytest.raises(InvalidRequestError, match="an adapter's name is"):
            store.add(name, adapter(model))
    for slots in (0, -1, True, 2.0, None):
        with pytest.raises(InvalidRequestError, match=r"device_slots is .*; a number of at least 1"):
            AdapterStore(model, device_slots=slots)


CONTENTS = 5


class Operations(RuleBasedStateMachine):
    """Loads, replaces, unloads, holds and places in any order: exact accounting, and each slot's own content."""

    model: Model
    contents: list[Adapter]

    def __init__(self) -> None:
        super().__init__()
        self.store = AdapterStore(self.model, device_slots=2)
        self.held: list = []

    @rule(name=st.sampled_from("abc"), which=st.integers(0, CONTENTS - 1), scale=st.sampled_from([1.0, -0.5]))
    def load(self, name, which, scale) -> None:
        self.store.add(name, self.contents[which], scale)

    @rule(name=st.sampled_from("abc"))
    def unload(self, name) -> None:
        if name in self.store.names:
            self.store.unload(name)
            assert name not in self.store.names

    @rule(name=st.sampled_from("abc"))
    def acquire(self, name) -> None:
        if name in self.store.names:
            self.held.append(self.store.acquire(name))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data) -> None:
        self.store.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def place(self, data) -> None:
        rows = data.draw(st.lists(st.tuples(st.sampled_from(self.held), st.sampled_from([1.0, 2.0])), max_size=4))
        distinct = {(one.content_hash, one.effective(scale)) for one, scale in rows}
        if len(distinct) > 2:
            with pytest.raises(CapacityError):
                self.store.place(rows)
            return
        for (one, scale), slot in zip(rows, self.store.place(rows)):
            want = one.effective(scale) * product(one.adapter)
            assert nmse(want, delta(self.store, slot)) < 1e-12

    @invariant()
    def accounts(self) -> None:
        alive = {self.store.get(name) for name in self.store.names} | set(self.held)
        sizes = {one.content_hash: one.adapter.nbytes for one in alive}
        assert self.store.host_bytes == sum(sizes.values())
        assert (self.store.stacks is None) == (not alive)
        holders = Counter(map(id, self.held))
        assert all(one.holders == holders[id(one)] for one in alive)


def test_any_order_of_operations(model: Model) -> None:
    Operations.model = model
    Operations.contents = [adapter(model, i, rank=(2, 8, 8, 12, 3)[i]) for i in range(CONTENTS)]
    run = settings(max_examples=25, stateful_step_count=25, deadline=None)
    case = Operations.TestCase
    case.settings = run
    case().runTest()
