"""Low-rank adapters, one per row: every backend against the reference, row invariance bit for bit, gradients, vmap."""

import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import native
from pallas_kernels.grouped_lora import UnsupportedError, api, grouped_lora, grouped_lora_many
from pallas_kernels.grouped_lora.case import Adapters
from pallas_kernels.grouped_lora.reference import delta

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
NATIVE = pytest.param("native", marks=needs_native)
BACKENDS = ["xla", NATIVE]
PALLAS = ["interpret", "interpret_tpu"]
EITHER = "native" if native.available() else "xla"  # for what no backend has a part in
BOUND = {"float32": 1e-6, "bfloat16": 1e-5, "float16": 1e-5}  # NMSE


def array(rng, *shape, dtype="float32") -> jax.Array:
    return jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)


def adapters(rng, layers, slots, rank, k, n, dtype="float32") -> Adapters:
    return Adapters(
        array(rng, layers, slots, rank, k, dtype=dtype),
        array(rng, layers, slots, n, rank, dtype=dtype),
        array(rng, slots),
    )


def nmse(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(((got - want) ** 2).sum() / (want**2).sum())


class Shape(NamedTuple):
    rows: int
    slots: int
    rank: int
    k: int
    n: int


SHAPES = [
    Shape(1, 1, 4, 64, 64),
    Shape(8, 4, 16, 576, 1536),
    Shape(5, 3, 8, 96, 33),
    Shape(13, 6, 17, 70, 5),
    Shape(40, 3, 33, 131, 100),
    Shape(3, 2, 128, 256, 48),
    Shape(150, 2, 16, 48, 31),
    Shape(20, 17, 20, 1100, 130),
]
QUICK = {  # the other combinations are slow tests
    "xla": [(SHAPES[3], "bfloat16"), (SHAPES[6], "float32"), (SHAPES[1], "float16")],
    "native": [
        *((shape, "float16") for shape in SHAPES),
        *((SHAPES[i], dtype) for i in (3, 7) for dtype in ("float32", "bfloat16")),
    ],
    "interpret": [(SHAPES[2], "float16"), (SHAPES[4], "float32"), (Shape(20, 2, 5, 1100, 20), "bfloat16")],
    "interpret_tpu": [(SHAPES[3], "bfloat16"), (SHAPES[6], "float32")],
}


def cases() -> list[Any]:
    out = []
    for backend, quick in QUICK.items():
        types = [dtype for dtype in BOUND if backend != "interpret_tpu" or dtype != "float16"]
        every = dict.fromkeys([*quick, *((shape, dtype) for shape in SHAPES for dtype in types)])
        for case in every:
            marks = [needs_native] if backend == "native" else []
            if case not in quick:
                marks.append(pytest.mark.slow)
            shape, dtype = case
            out.append(pytest.param(backend, *case, marks=marks, id=f"{backend}-{dtype}-{'x'.join(map(str, shape))}"))
    return out


@pytest.mark.parametrize(("backend", "shape", "dtype"), cases())
def test_against_the_reference(backend, shape, dtype):
    m, count, rank, k, n = shape
    rng = np.random.default_rng(0)
    one, x, base = adapters(rng, 2, count, rank, k, n, dtype), array(rng, m, k), array(rng, m, n)
    slots = jnp.asarray(rng.integers(0, count, m), jnp.int32)
    if m > 1:
        slots = slots.at[::3].set(-1)

    @jax.jit
    def run(x, slots, one, layer, base):
        return grouped_lora(x, slots, *one, layer=layer, base=base, backend=backend)

    want = delta(x, slots, one, 1)
    got = run(x, slots, one, 1, jnp.zeros_like(base))
    assert got.shape == (m, n)
    assert nmse(got, want) < BOUND[dtype]
    np.testing.assert_allclose(run(x, slots, one, 1, base), base + got, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", [*BACKENDS, *PALLAS])
def test_a_row_without_an_adapter_keeps_its_base_bit_for_bit(backend):
    rng = np.random.default_rng(1)
    one, x = adapters(rng, 1, 3, 8, 64, 40), array(rng, 6, 64)
    base = array(rng, 6, 40).at[:, 0].set(-0.0).at[:, 1].set(jnp.nan)  # bits that adding 0.0 would change, or not see
    one = Adapters(*(w[0] for w in one[:2]), one.scales)

    def bits(y):
        return np.asarray(y).view(np.uint32)

    run = jax.jit(lambda slots, base: grouped_lora(x, slots, *one, base=base, backend=backend))
    nowhere = jnp.array([-1, -1, 3, 2**31 - 1, -(2**31), -5], jnp.int32)  # numbers of no slot
    np.testing.assert_array_equal(bits(run(nowhere, base)), bits(base))
    mixed = nowhere.at[2].set(1)
    got = run(mixed, base)
    np.testing.assert_array_equal(np.delete(bits(got), 2, 0), np.delete(bits(base), 2, 0))
    assert (got[2] != base[2])[2:].all()
    alone = grouped_lora(x, mixed, *one, backend=backend)
    assert not bits(alone[jnp.array([0, 1, 3, 4, 5])]).any()
    assert jnp.array_equal(alone[2][2:] + base[2][2:], got[2][2:])


@pytest.mark.parametrize("backend", [*BACKENDS, *PALLAS])
def test_nothing_is_read_of_slots_that_no_row_uses(backend):
    rng = np.random.default_rng(2)
    one, x, base = adapters(rng, 2, 5, 9, 70, 35), array(rng, 7, 70), array(rng, 7, 35)
    slots = jnp.array([4, 1, -1, 4, 1, 1, -1], jnp.int32)
    used = jnp.zeros((2, 5), bool).at[1, jnp.array([1, 4])].set(True)
    poisoned = Adapters(
        *(jnp.where(used[:, :, None, None], w, jnp.nan) for w in one[:2]), jnp.where(used[1], one.scales, jnp.nan)
    )
    run = jax.jit(lambda one, slots: grouped_lora(x, slots, *one, layer=1, base=base, backend=backend))
    np.testing.assert_array_equal(run(poisoned, slots), run(one, slots))
    everything = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), one)
    np.testing.assert_array_equal(run(everything, jnp.full(7, -1)), base)


def check_company(backend, m, rank, k, n, dtype, parts):
    rng = np.random.default_rng(3)
    one, x, base = adapters(rng, 2, 4, rank, k, n, dtype), array(rng, m, k), array(rng, m, n)
    slots = jnp.asarray(rng.integers(-1, 4, m), jnp.int32)

    @jax.jit
    def run(x, slots, base):
        return grouped_lora(x, slots, *one, layer=1, base=base, backend=backend)

    want = np.asarray(run(x, slots, base))
    for part in parts:
        np.testing.assert_array_equal(run(x[part], slots[part], base[part]), want[part], err_msg=str(part))
    for slot in (0, 3):
        mine = np.flatnonzero(slots == slot)
        np.testing.assert_array_equal(run(x, jnp.full(m, slot), base)[mine], want[mine], err_msg=f"all in {slot}")
    order = rng.permutation(m)
    np.testing.assert_array_equal(run(x[order], slots[order], base[order]), want[order])


PARTS = [slice(0, 1), slice(3, 5), slice(60, 68), slice(9, 140)]
MORE_PARTS = [*PARTS, slice(100, 117), slice(2, 5), slice(20, 32), slice(0, 128), slice(50, 114)]


@pytest.mark.parametrize(
    ("backend", "m", "rank", "k", "n", "dtype", "parts"),
    [
        ("xla", 140, 16, 576, 600, "float16", PARTS),
        pytest.param("native", 140, 16, 576, 600, "float16", PARTS, marks=needs_native),
        pytest.param("native", 140, 5, 70, 19, "float32", PARTS, marks=needs_native),
        ("interpret", 20, 5, 70, 19, "float16", [slice(10, 17)]),
        ("interpret_tpu", 20, 5, 70, 19, "bfloat16", [slice(10, 17)]),
    ],
)
def test_a_row_has_the_same_bits_in_any_company(backend, m, rank, k, n, dtype, parts):
    check_company(backend, m, rank, k, n, dtype, parts)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rank", "k", "n", "dtype"),
    [(5, 70, 19, "float32"), (40, 200, 3, "bfloat16"), (16, 2048, 2048, "float16"), (8, 8192, 100, "float32")],
)
def test_a_row_has_the_same_bits_in_any_company_at_more_shapes(backend, rank, k, n, dtype):
    check_company(backend, 200, rank, k, n, dtype, MORE_PARTS)


@pytest.mark.parametrize("backend", [*BACKENDS, *PALLAS])
def test_several_linears_share_one_call(backend):
    rng = np.random.default_rng(4)
    x, slots = array(rng, 8, 40), jnp.array([0, 2, -1, 1, 1, 0, -1, 2], jnp.int32)
    linears = [
        adapters(rng, 2, 3, 16, 40, 24, "bfloat16" if backend == "interpret_tpu" else "float16"),
        adapters(rng, 2, 3, 4, 40, 33, "float32"),
    ]
    bases = [array(rng, 8, one.b.shape[2]) for one in linears]

    @jax.jit
    def together(x, slots, bases):
        return grouped_lora_many(x, slots, linears, layer=1, bases=bases, backend=backend)

    @jax.jit
    def alone(x, slots, bases):
        pairs = zip(linears, bases, strict=True)
        return [grouped_lora(x, slots, *one, layer=1, base=base, backend=backend) for one, base in pairs]

    for y, one, base, want in zip(together(x, slots, bases), linears, bases, alone(x, slots, bases), strict=True):
        np.testing.assert_array_equal(y, want)
        assert nmse(y - base, delta(x, slots, one, 1)) < 1e-5
    if backend == "native":
        assert together.lower(x, slots, bases).as_text().count("realm_grouped_lora") == 1


def test_vmap_adds_rows():
    rng = np.random.default_rng(5)
    one, x, base = adapters(rng, 2, 4, 8, 64, 48), array(rng, 6, 3, 64), array(rng, 6, 3, 48)
    slots = jnp.asarray(rng.integers(-1, 4, (6, 3)), jnp.int32)

    def op(x, slots, base, layer=1):
        return grouped_lora(x, slots, *one, layer=layer, base=base, backend=EITHER)

    want = np.asarray(jax.jit(op)(x, slots, base))
    np.testing.assert_array_equal(jax.jit(jax.vmap(op))(x, slots, base), want)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(op)))(x, slots, base), want)
    shared = jax.jit(jax.vmap(op, in_axes=(None, 0, None)))(x[0], slots, base[0])  # one x, other adapters
    np.testing.assert_array_equal(shared[2], op(x[0], slots[2], base[0]))
    np.testing.assert_array_equal(
        jax.vmap(op, in_axes=(1, None, 1), out_axes=1)(x, slots[:, 0], base),
        jax.jit(op)(x, jnp.broadcast_to(slots[:, :1], (6, 3)), base),
    )
    layers = jax.vmap(lambda layer: op(x, slots, base, layer))(jnp.arange(2))
    np.testing.assert_array_equal(layers, jnp.stack([op(x, slots, base, layer) for layer in range(2)]))
    text = str(jax.make_jaxpr(jax.vmap(jax.vmap(op)))(x, slots, base))
    assert "f32[18,64]" in text  # all rows in one call


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scan_over_layers_does_not_copy_the_stack(backend, dtype):
    """16 layers of 4 adapters, 8 MB: temporaries of the scan stay near the adapters of one slot."""
    spec = Adapters(
        jax.ShapeDtypeStruct((16, 4, 16, 2048), dtype),
        jax.ShapeDtypeStruct((16, 4, 2048, 16), dtype),
        jax.ShapeDtypeStruct((4,), jnp.float32),
    )
    x, slots = jax.ShapeDtypeStruct((8, 2048), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)

    def forward(x, slots, one):
        def step(x, layer):
            return grouped_lora(x, slots, *one, layer=layer, base=x, backend=backend), None

        return jax.lax.scan(step, x, jnp.arange(16, dtype=jnp.int32))[0]

    memory = jax.jit(forward).lower(x, slots, spec).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_gradients(dtype):
    rng = np.random.default_rng(6)
    one, x, base = adapters(rng, 2, 4, 6, 40, 24, dtype), array(rng, 9, 40), array(rng, 9, 24)
    slots = jnp.array([0, -1, 3, 3, 0, 2, -1, 4, 0], jnp.int32)

    def loss(run):
        return lambda x, base, a, b, scales: (jnp.sin(run(x, base, Adapters(a, b, scales)))).sum()

    def ours(x, base, one):
        return grouped_lora(x, slots, *one, layer=1, base=base, backend=EITHER)

    def plain(x, base, one):
        return base + delta(x, slots, one, 1)

    every = tuple(range(5))
    got = jax.jit(jax.grad(loss(ours), argnums=every))(x, base, *one)
    want = jax.grad(loss(plain), argnums=every)(x, base, *one)
    for name, g, w in zip(("x", "base", "a", "b", "scales"), got, want, strict=True):
        assert g.dtype == w.dtype, name
        # both are rounded to the adapters' type, and sin carries the forward's own rounding
        assert nmse(g, w) < (1e-9 if dtype == "float32" else 1e-6), name
        assert np.isfinite(np.asarray(g)).all()
    assert not got[2][0].any()  # the other layer
    assert not got[2][1, 1].any()  # a slot without rows


def test_gradients_under_vmap():
    rng = np.random.default_rng(7)
    one, x = adapters(rng, 1, 3, 4, 16, 12), array(rng, 5, 2, 16)
    slots = jnp.array([0, -1, 2, 2, 1], jnp.int32)

    def loss(run):
        return lambda x, slot, a: (run(x, jnp.full(2, slot), Adapters(a, *one[1:])) ** 2).sum()

    ours = loss(lambda x, slots, one: grouped_lora(x, slots, *one, layer=0))
    plain = loss(lambda x, slots, one: delta(x, slots, one, 0))
    for argnum in (0, 2):
        got, want = (
            jax.jit(jax.vmap(jax.grad(f, argnums=argnum), in_axes=(0, 0, None)))(x, slots, one.a) for f in (ours, plain)
        )
        assert nmse(got, want) < 1e-10
    by_x, by_a = (jax.jit(jax.grad(ours, argnums=argnum))(x[0], slots[0], one.a) for argnum in (0, 2))
    assert by_x.shape == x[0].shape
    assert by_a.shape == one.a.shape


def test_empty_calls():
    rng = np.random.default_rng(8)
    one = adapters(rng, 1, 2, 4, 16, 12)
    a, b, scales = one.a[0], one.b[0], one.scales
    none = jnp.zeros(0, jnp.int32)
    assert grouped_lora(jnp.zeros((0, 16)), none, a, b, scales, backend=EITHER).shape == (0, 12)
    x, slots, base = array(rng, 3, 16), jnp.zeros(3, jnp.int32), array(rng, 3, 12)
    rankless = grouped_lora(x, slots, a[:, :0], b[:, :, :0], scales, base=base, backend=EITHER)
    np.testing.assert_array_equal(rankless, base)
    lone = grouped_lora(x[0], slots[0], a, b, scales, base=base[0], backend=EITHER)
    np.testing.assert_array_equal(lone, grouped_lora(x, slots, a, b, scales, base=base, backend=EITHER)[0])


@needs_native
@pytest.mark.parametrize("name", native.ISAS)
def test_every_instruction_set(name, monkeypatch):
    """AVX2 and AVX-512 give the same bits; the plain code, without fused multiply-add, nearly the same."""
    if native.ISAS.index(name) > native.isa():
        pytest.skip(f"this processor has no {name}")
    rng = np.random.default_rng(9)
    for i, (m, count, rank, k, n) in enumerate(SHAPES):
        for dtype in list(BOUND)[i % 3 :: 2]:
            one, x, base = adapters(rng, 1, count, rank, k, n, dtype), array(rng, m, k), array(rng, m, n)
            slots = jnp.asarray(rng.integers(-1, count, m), jnp.int32)
            want = jax.jit(lambda: grouped_lora(x, slots, *one, layer=0, base=base, backend="native"))()  # noqa: B023
            with monkeypatch.context() as patch:
                patch.setattr("pallas_kernels.grouped_lora.native.isa", lambda: native.ISAS.index(name))
                got = jax.jit(lambda: grouped_lora(x, slots, *one, layer=0, base=base, backend="native"))()  # noqa: B023
            if name == "plain":
                assert nmse(got, want) < 1e-12
            else:
                np.testing.assert_array_equal(got, want, err_msg=f"{dtype} {m} {count} {rank} {k} {n}")


def test_what_is_refused():
    rng = np.random.default_rng(10)
    x, slots = array(rng, 3, 16), jnp.zeros(3, jnp.int32)
    a, b, scales = array(rng, 2, 4, 16), array(rng, 2, 12, 4), array(rng, 2)
    for message, wrong in {
        r"'cuda' is not available for grouped_lora; accepted: auto, xla, native, gpu, tpu, interpret, interpret_tpu": {
            "backend": "cuda"
        },
        r"a has shape \(2, 4, 16\), expected 4 axes": {"layer": 0},
        r"slots has shape \(2,\), expected \(3,\)": {"slots": slots[:2]},
        r"slots is float32, expected int32": {"slots": x[:, 0]},
        r"x is int32 \(3,\), expected float32": {"x": slots},
        r"a has shape \(2, 4, 15\), expected \(2, 4, 16\)": {"a": a[:, :, :15]},
        r"b has shape \(1, 12, 4\), expected \(2, 12, 4\)": {"b": b[:1]},
        r"b has shape \(2, 12, 3\), expected \(2, 12, 4\)": {"b": b[:, :, :3]},
        r"scales has shape \(1,\), expected \(2,\)": {"scales": scales[:1]},
        r"scales is float16, expected float32": {"scales": scales.astype(jnp.float16)},
        r"base has shape \(3, 11\), expected \(3, 12\)": {"base": jnp.zeros((3, 11))},
    }.items():
        arguments = {"x": x, "slots": slots, "a": a, "b": b, "scales": scales, **wrong}
        with pytest.raises(ValueError, match=message):
            grouped_lora(**arguments)
    with pytest.raises(UnsupportedError, match="a is int8; accepted: float32, bfloat16, float16"):
        grouped_lora(x, slots, a.astype(jnp.int8), b, scales)
    with pytest.raises(UnsupportedError, match="'cuda'"):
        grouped_lora(x, slots, a, b, scales, backend="cuda")
    with pytest.raises(ValueError, match="there are no linears"):
        grouped_lora_many(x, slots, [])
    with pytest.raises(ValueError, match="there are 2 bases for 1 linears"):
        grouped_lora_many(x, slots, [(a, b, scales)], bases=[jnp.zeros((3, 12))] * 2)


def test_native_says_why_not(monkeypatch, caplog):
    from pallas_kernels.grouped_lora import native as backend

    monkeypatch.setattr(backend, "available", lambda: False)
    monkeypatch.setattr(backend, "why_not", lambda: "no compiler")
    case = api.case_of(3, (adapters(np.random.default_rng(0), 1, 2, 4, 16, 12),))
    with pytest.raises(UnsupportedError, match="grouped_lora, backend 'native': no compiler"):
        api.resolve("native", case)
    api._say_once.cache_clear()
    with caplog.at_level("INFO", logger="pallas_kernels.grouped_lora.api"):
        assert api.resolve("auto", case) == api.resolve("auto", case) == "xla"
    assert caplog.messages == ["grouped_lora is served by XLA: no compiler"]


CARDS = {"sm80": "NVIDIA A100-SXM4-80GB", "sm90": "NVIDIA H100 80GB HBM3", "T4": "Tesla T4"}
TRITON = "__gpu$xla.gpu.triton"
LOWERED = [  # rows, K, N of the linears, rank, dtype
    (8, 4096, (4096, 1024, 1024), 16, "bfloat16"),
    (1, 576, (576,), 4, "float32"),
    (13, 70, (33, 5), 17, "bfloat16"),
    (512, 2048, (8192,), 64, "float32"),
    (8, 14336, (4096,), 256, "bfloat16"),
]


def traced(rows, k, outputs, rank, dtype, backend):
    """A jitted call with the layer traced, and its arguments' shapes."""
    shape = jax.ShapeDtypeStruct
    linears = [
        (shape((4, 6, rank, k), dtype), shape((4, 6, n, rank), dtype), shape((6,), jnp.float32)) for n in outputs
    ]
    bases = [shape((rows, n), jnp.float32) for n in outputs]

    def run(x, slots, layer, linears, bases):
        return grouped_lora_many(x, slots, linears, layer=layer, bases=bases, backend=backend)

    scalar = shape((), jnp.int32)
    return run, (shape((rows, k), jnp.float32), shape((rows,), jnp.int32), scalar, linears, bases)


def exported(case, backend, platform, card=None) -> str:
    run, arguments = traced(*case, backend)

    def lower():
        allowed = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
        return jax.export.export(jax.jit(run), platforms=[platform], disabled_checks=allowed)(*arguments).mlir_module()

    if card is None:
        return lower()
    device = AbstractDevice(device_kind=CARDS[card], num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return lower()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("card", ["sm80", "sm90"])
@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_lowers_for_cards(case, card):
    for dtype in dict.fromkeys([case[-1], "float16"]):
        assert exported((*case[:-1], dtype), "gpu", "cuda", card).count(f"@{TRITON}") == 2  # however many linears


@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_lowers_for_tpus(case):
    assert exported(case, "tpu", "tpu").count("@tpu_custom_call") == 2 * len(case[2])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_compiles_for_tpus(case, topology):
    from jax.experimental import topologies

    place = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(topology, platform="tpu").devices[0])
    run, arguments = traced(*case, "tpu")
    program = jax.jit(run, in_shardings=place, out_shardings=place).trace(*arguments)
    assert program.lower(lowering_platforms=("tpu",)).compile().memory_analysis().temp_size_in_bytes < 1 << 20


def test_cases_that_pallas_refuses():
    with pytest.raises(UnsupportedError, match=r"backend 'gpu': the card has compute capability 7\.5"):
        exported(LOWERED[0], "gpu", "cuda", "T4")
    with pytest.raises(UnsupportedError, match="backend 'tpu': TPUs have no float16"):
        exported((8, 64, (64,), 8, "float16"), "tpu", "tpu")
    for backend in ("gpu", "tpu"):
        with pytest.raises(UnsupportedError, match="rank 257 is above 256"):
            exported((8, 64, (64,), 257, "float32"), backend, "tpu")
