"""Attention over contiguous keys: every backend against the reference, padding, bits, vmap, memory, and lowering.

The Pallas kernels run in interpret mode here, and are lowered for cards and TPUs that are not there.
"""

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import native
from pallas_kernels.flash_attention import (
    BACKENDS,
    UnsupportedError,
    api,
    blocks,
    flash_attention,
    gpu_hopper,
    reference,
)
from pallas_kernels.flash_attention import native as flash_native
from pallas_kernels.flash_attention.case import Options, bounds_of

NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason=native.why_not()))
TESTED = ["xla", NATIVE, "interpret", "interpret_tpu"]
LIMIT = {"float32": 1e-6, "bfloat16": 1e-5, "float16": 1e-5}  # NMSE
TRITON = "__gpu$xla.gpu.triton"
HANDLER = "realm_flash_attention"
CARDS = {"T4": "Tesla T4", "sm80": "NVIDIA A100-SXM4-80GB", "sm90": "NVIDIA H100 80GB HBM3"}


@dataclass(frozen=True)
class Case:
    batch: int = 2
    queries: int = 70
    keys: int = 70
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    value_dim: int = 64
    starts: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    sinks: bool = False
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    scale: float | None = None

    @property
    def static(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("causal", "window", "softcap", "scale")}

    def arrays(self, dtype: str, seed: int = 0) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        """q, k, v; and the arrays given by name."""
        rng = np.random.default_rng(seed)
        shapes = (
            (self.batch, self.queries, self.heads, self.dim),
            (self.batch, self.keys, self.kv_heads, self.dim),
            (self.batch, self.keys, self.kv_heads, self.value_dim),
        )
        named = {n: jnp.asarray(a, jnp.int32) for n in ("starts", "lengths") if (a := getattr(self, n)) is not None}
        if self.sinks:
            named["sinks"] = jnp.asarray(rng.standard_normal(self.heads), jnp.float32)
        return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes], named


CASES = {
    "causal, grouped heads": Case(),
    "chunk of a ragged batch, window, soft-cap, sinks": Case(
        queries=40, keys=150, starts=(100, 17), lengths=(130, 30), window=33, softcap=4.0, sinks=True, dim=80, scale=0.2
    ),
    "bidirectional, other head sizes, sinks": Case(
        batch=1, queries=75, keys=130, heads=2, dim=72, value_dim=128, causal=False, sinks=True
    ),
    "bidirectional window, one sequence empty": Case(queries=140, keys=140, lengths=(140, 0), causal=False, window=30),
    "one query": Case(queries=1, keys=200, starts=(199, 55), lengths=(200, 56), heads=1, kv_heads=1, dim=256),
    "queries before and behind the keys": Case(queries=90, keys=40, starts=(-20, 30)),
    "negative scale": Case(scale=-0.1),
    "heads of 192 and 128": Case(dim=192, value_dim=128, queries=33),
    "more queries than a tile": Case(batch=1, queries=300, keys=300, lengths=(290,), window=200),
}
FIRST, SECOND, THIRD = list(CASES)[:3]
QUICK = [(FIRST, "float32"), (SECOND, "bfloat16")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks from little data."""
    sizes = {256: blocks.GpuBlocks(32, 32, 4, 1)}
    gpu = {"forward": sizes, "dq": sizes, "dkv": {256: blocks.GpuBlocks(16, 64, 4, 1)}}
    monkeypatch.setattr(blocks, "_HALF", {80: gpu})
    monkeypatch.setattr(blocks, "_FLOAT32", gpu)
    monkeypatch.setattr(blocks, "_TPU", {256: blocks.TpuBlocks(128, 128, 128, 128)})
    api._operation.cache_clear()
    yield
    api._operation.cache_clear()


def nmse(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(((got - want) ** 2).sum() / max((want**2).sum(), 1e-30))


def padding(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Which queries [B, T] and which keys [B, S] are padding."""
    starts = np.asarray(case.starts or (0,) * case.batch)[:, None]
    lengths = np.asarray(case.lengths)[:, None]
    return starts + np.arange(case.queries) >= lengths, np.arange(case.keys) >= lengths


def run(backend: str, case: Case, dtype: str, arrays: list[jax.Array], named: dict[str, Any], arriving: Any) -> Any:
    """(out, lse), and the gradients of q, k, v and sinks."""
    names = [name for name in named if name == "sinks"]

    def loss(args: Any) -> Any:
        out, lse = flash_attention(
            *args[:3], **named | dict(zip(names, args[3:])), **case.static, backend=backend, return_lse=True
        )
        weighted = out.astype(jnp.float32) * arriving[0]
        return weighted.sum() + jnp.where(lse > -jnp.inf, lse * arriving[1], 0.0).sum(), (out, lse)

    arguments = [*arrays, *(named[name] for name in names)]
    (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)
    return results, gradients


def check(backend: str, case: Case, dtype: str) -> None:
    arrays, named = case.arrays(dtype)
    rng = np.random.default_rng(1)
    out_shape = (case.batch, case.queries, case.heads, case.value_dim)
    # Of the arrays' type: the gradient of a bfloat16 output is one.
    arriving = [jnp.asarray(rng.standard_normal(out_shape), dtype), jnp.asarray(rng.standard_normal(out_shape[:3]))]
    arriving = [a.astype(jnp.float32) for a in arriving]
    wide = [a.astype(jnp.float32) for a in arrays]
    if case.lengths is not None:  # what lies in padding must not matter
        no_query, no_key = padding(case)
        q, k, v = (np.array(a.astype(jnp.float32)) for a in arrays)
        q[no_query], k[no_key], v[no_key] = np.nan, np.nan, np.nan
        arrays = [jnp.asarray(a, dtype) for a in (q, k, v)]
        arriving = [jnp.where(no_query.reshape(*no_query.shape, *(1,) * (a.ndim - 2)), 0.0, a) for a in arriving]
    (out, lse), gradients = run(backend, case, dtype, arrays, named, arriving)
    (want, want_lse), want_gradients = run("reference", case, "float32", wide, named, arriving)

    assert out.dtype == dtype
    assert [g.dtype for g in gradients[:3]] == [dtype] * 3
    assert nmse(out, want) < LIMIT[dtype]
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    np.testing.assert_allclose(np.where(np.isneginf(lse), 0, lse), np.where(np.isneginf(lse), 0, want_lse), atol=1e-5)
    for name, got, exact in zip(("q", "k", "v"), gradients, want_gradients):
        assert nmse(got, exact) < LIMIT[dtype], name
    if case.sinks:  # a sum over queries whose terms cancel, of outputs that were rounded
        assert nmse(gradients[3], want_gradients[3]) < (1e-6 if dtype == "float32" else 1e-3)
    if case.lengths is not None:
        for a, where in zip((out, *gradients), (no_query, no_query, no_key, no_key)):
            assert not np.asarray(a, np.float32)[where].any()


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize(("name", "dtype"), QUICK)
def test_against_the_reference(backend: str, name: str, dtype: str) -> None:
    check(backend, CASES[name], dtype)


@pytest.mark.parametrize("backend", ["xla", NATIVE])
def test_half_precision_and_other_head_sizes(backend: str) -> None:
    check(backend, CASES[THIRD], "float16")


@pytest.mark.skipif(not native.available(), reason=native.why_not())
@pytest.mark.parametrize("isa", native.ISAS)
def test_native_on_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.ISAS.index(isa) > native.isa():
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setattr(flash_native, "isa", lambda: native.ISAS.index(isa))
    for name in ("queries before and behind the keys", "one query", "more queries than a tile"):
        check("native", CASES[name], "float32")


@pytest.mark.slow
@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("name", CASES)
def test_all_cases_and_types(backend: str, name: str, dtype: str) -> None:
    if backend == "native" and "bidirectional window" in name:
        pytest.skip("refused")
    check(backend, CASES[name], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["interpret", "interpret_tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_block_sizes_of_real_devices(backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check(backend, Case(batch=1, queries=600, keys=700, starts=(50,), lengths=(640,), heads=2, kv_heads=1), dtype)


def test_the_reference_is_softmax() -> None:
    (q, k, v), _ = Case(batch=1, heads=1, kv_heads=1).arrays("float32")
    got = flash_attention(q, k, v, causal=False, backend="reference")
    scores = np.asarray(q[0, :, 0], np.float64) @ np.asarray(k[0, :, 0], np.float64).T / 8
    weights = np.exp(scores)
    assert nmse(got[0, :, 0], weights / weights.sum(1, keepdims=True) @ np.asarray(v[0, :, 0], np.float64)) < 1e-12


def test_reference_of_windows_and_sinks() -> None:
    # Keys and queries of zeros: every weight is equal, so outputs count what is seen.
    q, v = jnp.zeros((1, 6, 1, 8)), jnp.ones((1, 6, 1, 8))
    rows = jnp.arange(6.0)[None, :, None, None] * v

    def first(**named: Any) -> list[float]:
        return np.asarray(flash_attention(q, q, rows, backend="reference", **named))[0, :, 0, 0].tolist()

    assert first() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert first(window=2) == [0, 0.5, 1.5, 2.5, 3.5, 4.5]
    assert first(window=2, causal=False) == [0.5, 1, 2, 3, 4, 4.5]
    assert first(lengths=jnp.array([4])) == [0, 0.5, 1, 1.5, 0, 0]
    assert first(starts=jnp.array([3])) == [1.5, 2, 2.5, 2.5, 2.5, 2.5]
    assert first(sinks=jnp.zeros(1), window=1) == [0, 0.5, 1, 1.5, 2, 2.5]


def pieces(backend: str, case: Case, sizes: list[int], q: Any, k: Any, v: Any, **named: Any) -> np.ndarray:
    """The queries of the only sequence computed in calls of ``sizes`` queries, keys being cut off behind the last."""
    step = jax.jit(
        lambda q, k, v, start: flash_attention(q, k, v, starts=start, **named, **case.static, backend=backend),
    )
    out, at = [], 0
    for size in sizes:
        keys = at + size
        out.append(step(q[:, at : at + size], k[:, :keys], v[:, :keys], jnp.array([at])))
        at += size
    return np.concatenate([np.asarray(a) for a in out], axis=1)


@pytest.mark.parametrize("backend", ["xla", NATIVE])
@pytest.mark.parametrize(
    ("heads", "window", "sizes"),
    [((1, 1), 0, [[129, 1]]), ((6, 2), 40, [[200, 1, 2, 87], [16] * 3])],
    ids=["one row", "grouped heads and window"],
)
def test_bits_do_not_depend_on_how_queries_are_cut(
    backend: str, heads: tuple[int, int], window: int, sizes: list[list[int]]
) -> None:
    case = Case(1, 290, 290, *heads, window=window, softcap=0.1 * window, sinks=True)
    (q, k, v), named = case.arrays("float32")
    whole = functools.partial(flash_attention, **named, **case.static, backend=backend)
    want = np.asarray(jax.jit(whole)(q, k, v))
    for cut in sizes:
        np.testing.assert_array_equal(pieces(backend, case, cut, q, k, v, **named), want[:, : sum(cut)])
    batch = jax.jit(functools.partial(whole, lengths=jnp.array([90, 290, 17])))
    wide = [jnp.pad(jnp.tile(a, (3, 1, 1, 1)), ((0, 0), (0, 100), (0, 0), (0, 0))) for a in (q, k, v)]
    got = np.asarray(batch(*wide))
    for row, length in enumerate((90, 290, 17)):
        np.testing.assert_array_equal(got[row, :length], want[0, :length])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["interpret", "interpret_tpu"])
def test_kernels_bits_do_not_depend_on_how_queries_are_cut(backend: str) -> None:
    # Interpreted, that is compiled by XLA, a block with a mask and one without round differently: cuts at whole tiles.
    case = Case(batch=1, queries=150, keys=150, heads=2, kv_heads=1)
    (q, k, v), _ = case.arrays("float32")
    want = np.asarray(jax.jit(lambda *a: flash_attention(*a, backend=backend))(q, k, v))
    np.testing.assert_array_equal(pieces(backend, case, [96, 54], q, k, v), want)


@pytest.mark.parametrize("backend", ["xla", NATIVE, pytest.param("interpret", marks=pytest.mark.slow)])
def test_vmap_merges_into_the_batch(backend: str) -> None:
    case = Case(queries=20, keys=20)
    (q, k, v), _ = case.arrays("float32")
    queries, lengths = jnp.stack([q, q + 1, q * 2]), jnp.array([[20, 5], [9, 13], [1, 20]])
    sinks = jnp.arange(12.0).reshape(3, 4)

    def loss(q: Any, k: Any, lengths: Any, sinks: Any) -> Any:
        out = flash_attention(q, k, v, lengths=lengths, sinks=sinks, backend=backend)
        return (out**2).sum(), out

    one = jax.value_and_grad(loss, (0, 1, 3), has_aux=True)
    got = jax.jit(jax.vmap(one, in_axes=(0, None, 0, 0)))(queries, k, lengths, sinks)
    for i in range(3):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(one)(queries[i], k, lengths[i], sinks[i]))):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


def largest(jaxpr: Any) -> int:
    """Elements of the largest array any equation makes, inner jaxprs included."""
    found = 0
    for eqn in jaxpr.eqns:
        found = max([found, *(int(np.prod(v.aval.shape)) for v in eqn.outvars)])
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            found = max(found, largest(inner) if hasattr(inner, "eqns") else 0)
    return found


@pytest.mark.parametrize("backend", ["reference", "xla", "gpu", "tpu"])
def test_no_buffer_of_queries_times_keys(backend: str) -> None:
    case = Case(batch=1, queries=8192, keys=8192, heads=2, kv_heads=1)
    shapes = jax.eval_shape(lambda: case.arrays("float32")[0])

    def loss(q: Any, k: Any, v: Any) -> Any:
        return flash_attention(q, k, v, backend=backend).sum()

    size = largest(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*shapes).jaxpr)
    if backend == "reference":  # so the measure finds one
        assert size >= 8192 * 8192
    else:
        assert size <= 2 * 8192 * 128


def exported(case: Case, dtype: str, backend: str, platform: str, card: str | None = None) -> str:
    """The program of forward and backward as lowered for a platform."""
    shapes, named = jax.eval_shape(lambda: case.arrays(dtype))

    def loss(q: Any, k: Any, v: Any, named: Any) -> Any:
        return flash_attention(q, k, v, **named, **case.static, backend=backend).astype(jnp.float32).sum()

    def lower() -> Any:
        program = jax.jit(jax.grad(loss, (0, 1, 2)))
        allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (TRITON, "mosaic_gpu_v2", HANDLER)]
        return jax.export.export(program, platforms=[platform], disabled_checks=allowed)(*shapes, named)

    if card is None:
        return lower().mlir_module()
    device = AbstractDevice(device_kind=card, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return lower().mlir_module()


LOWERED = [
    (Case(queries=1024, keys=1024, dim=128, value_dim=128), "bfloat16"),
    (CASES["chunk of a ragged batch, window, soft-cap, sinks"], "float16"),
    (Case(queries=1024, keys=1024, dim=192, value_dim=128), "bfloat16"),
    (Case(dim=256, causal=False), "float32"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("card", ["sm80", "sm90"])
@pytest.mark.parametrize(("case", "dtype"), LOWERED)
def test_lowers_for_cards(case: Case, dtype: str, card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # block sizes of the card
    assert exported(case, dtype, "gpu", "cuda", CARDS[card]).count(f"@{TRITON}") == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("case", "dtype"), [LOWERED[0], LOWERED[2], (Case(queries=300, keys=300, lengths=(9, 300), window=70), "float16")]
)
def test_lowers_for_hopper(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    module = exported(case, dtype, "hopper", "cuda", CARDS["sm90"])
    assert module.count("@mosaic_gpu") == 1
    assert module.count(f"@{TRITON}") == 2  # backward


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, queries=140, keys=140, heads=1, kv_heads=1),
        Case(
            queries=130,
            keys=400,
            heads=2,
            kv_heads=1,
            starts=(200, 17),
            lengths=(330, 40),
            window=70,
            softcap=5.0,
            sinks=True,
            value_dim=128,
        ),
    ],
)
def test_hopper_kernel_simulated(case: Case) -> None:
    """Its three warpgroups as threads, with barriers and copies, looking for races."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("this jax has no public simulator of Mosaic GPU")
    (q, k, v), named = case.arrays("bfloat16")
    sinks = named.get("sinks")
    options = Options(case.causal, case.window, case.dim**-0.5, case.softcap, case.lengths is not None)
    bounds = bounds_of(named.get("lengths"), named.get("starts"), case.batch, case.queries, case.keys)
    wide = None if sinks is None else jnp.broadcast_to(sinks, (case.batch, case.heads))
    simulator = plgpu.InterpretGPUParams(detect_races=True)
    exact = [a.astype(jnp.float32) for a in (q, k, v)]
    if case.lengths is not None:
        no_query, no_key = (jnp.asarray(a)[..., None, None] for a in padding(case))
        q, k, v = (
            jnp.where(where, jnp.nan, a).astype(a.dtype) for where, a in zip((no_query, no_key, no_key), (q, k, v))
        )
    out, lse = jax.jit(lambda *a: gpu_hopper.forward(*a, options, interpret=simulator))(q, k, v, bounds, wide)
    want, want_lse = reference.attention(*exact, bounds, sinks, options)
    assert nmse(out, want) < LIMIT["bfloat16"]
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


@pytest.mark.parametrize(("case", "dtype"), LOWERED)
def test_lowers_for_tpus(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert exported(case, dtype, "tpu", "tpu").count("@tpu_custom_call") == 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(("case", "dtype"), [*LOWERED, (CASES["one query"], "bfloat16")])
def test_compiles_for_tpus(case: Case, dtype: str, topology: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import topologies

    monkeypatch.undo()
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    shapes, named = jax.eval_shape(lambda: case.arrays(dtype))

    def loss(q: Any, k: Any, v: Any, named: Any) -> Any:
        return flash_attention(q, k, v, **named, **case.static, backend="tpu").astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=place, out_shardings=place)
    assert program.trace(*shapes, named).lower(lowering_platforms=("tpu",)).compile().memory_analysis() is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_auto_takes_the_platforms_kernel() -> None:
    case = Case()
    assert exported(case, "bfloat16", "auto", "cuda", CARDS["sm90"]).count(f"@{TRITON}") == 3
    assert exported(case, "bfloat16", "auto", "tpu").count("@tpu_custom_call") == 3
    assert (f"@{HANDLER}" in exported(case, "bfloat16", "auto", "cpu")) == native.available()


def test_an_old_card_is_served_by_xla_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    api._say_once.cache_clear()
    with caplog.at_level("INFO", logger="pallas_kernels.flash_attention.api"):
        assert TRITON not in exported(Case(), "float16", "auto", "cuda", CARDS["T4"])
    assert "compute capability 7.5" in caplog.text
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5"):
        exported(Case(), "float16", "gpu", "cuda", CARDS["T4"])


def test_sizes_of_zero() -> None:
    for case in (Case(batch=0), Case(queries=0), Case(keys=0)):
        (q, k, v), _ = case.arrays("float32")
        out, lse = flash_attention(q, k, v, return_lse=True)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        assert not np.asarray(out).any()


def test_refusals() -> None:
    (q, k, v), _ = Case().arrays("float32")
    odd = Case(dim=100).arrays("float32")[0]
    wide = Case(value_dim=264).arrays("float32")[0]
    for backend in ("gpu", "tpu", "interpret"):
        with pytest.raises(UnsupportedError, match="head size of 100"):
            flash_attention(*odd, backend=backend)
        with pytest.raises(UnsupportedError, match="head size of 264"):
            flash_attention(*wide, backend=backend)
    for arguments, reason in ((odd, "float32"), ([a.astype("float16") for a in odd], "head size of 100")):
        with pytest.raises(UnsupportedError, match=reason):
            flash_attention(*arguments, backend="hopper")
    with pytest.raises(UnsupportedError, match=", ".join(BACKENDS)):
        flash_attention(q, k, v, backend="cuda")
    for arguments, named, message in [
        ((q[0], k, v), {}, "4 axes"),
        ((q, k[:, 1:], v), {}, "do not fit"),
        ((q, k, v[:1]), {}, "do not fit"),
        ((q[:, :, :3], k, v), {}, "3 query heads"),
        ((q, k.astype(jnp.bfloat16), v), {}, "one type"),
        ((q.astype(int), k.astype(int), v.astype(int)), {}, "one type"),
        ((q, k, v), {"lengths": jnp.array([1])}, r"shape \(1,\)"),
        ((q, k, v), {"starts": jnp.array([1.0, 2.0])}, "starts has type float32"),
        ((q, k, v), {"sinks": jnp.zeros(3)}, r"sinks .* shape \(3,\)"),
        ((q, k, v), {"window": -1}, "window -1"),
        ((q, k, v), {"softcap": -1.0}, "softcap -1.0"),
        ((q, k, v), {"scale": float("nan")}, "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            flash_attention(*arguments, **named)


def test_odd_head_sizes_go_to_xla() -> None:
    case = replace(CASES["causal, grouped heads"], dim=20, value_dim=12, queries=9, keys=9)
    (q, k, v), _ = case.arrays("float32")
    assert nmse(flash_attention(q, k, v), flash_attention(q, k, v, backend="reference")) < 1e-6
