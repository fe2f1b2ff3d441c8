"""The Pallas kernels of quant_matmul, interpreted, against float64; and lowered for the devices they are for.

Interpreted, a kernel's output is NaN wherever it has not been written.
"""

import importlib.util
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from test_quant_matmul import QUANTIZED, nmse, rows, weights

from pallas_kernels.quant_matmul import FORMATS, UnsupportedError, dequantize, expert_matmul, gpu, native, quant_matmul
from pallas_kernels.quant_matmul.blocks import GpuBlocks, gpu_blocks
from pallas_kernels.quant_matmul.sorting import sort_by_expert
from pallas_kernels.quant_matmul.unpack import ONE, fraction, weigher

# One of each kind: planes of 8; 4; 4 and 1; 4 and 2; 2 and 1 bits; groups of 16 and of 32; nibbles as scales and mins;
# float16 mins; exponents as scales; codebooks that are lines, a polynomial, a tree; shifts of runs.
FAMILIES = ["Q8_0", "Q4_K", "Q5_1", "Q6_K", "Q2_K", "MXFP4", "IQ4_XS", "IQ2_XXS", "IQ1_M"]
LOWERED = [*FAMILIES, "Q8_K", "Q1_0", "Q2_0", "NVFP4", "IQ3_S", "TQ2_0"]
INTERPRETED = ["interpret", "interpret_tpu"]
LIMIT = {"float32": 1e-6, "bfloat16": 1e-5}
TRITON = "__gpu$xla.gpu.triton"
CARDS = {"sm80": "NVIDIA A100-SXM4-80GB", "sm90": "NVIDIA H100 80GB HBM3"}


def quickly(f: Any) -> Any:
    """jit that spends less time on compiling what runs once."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def columns(name: str) -> int:
    """Columns that are no multiple of what the GPU's kernel reads in a step, where the type's block allows."""
    block = FORMATS[name].block
    return 768 if block == 256 else 512 + block


def poisoned(arrays: dict[str, jax.Array], layer: int) -> dict[str, jax.Array]:
    """A stack, with NaN for every float, and all ones for every code, of the layers other than ``layer``."""
    out = {}
    for key, a in arrays.items():
        other = jnp.arange(a.shape[0]).reshape(-1, *(1,) * (a.ndim - 1)) != layer
        value = np.nan if jnp.issubdtype(a.dtype, jnp.floating) else jnp.iinfo(a.dtype).max
        out[key] = jnp.where(other, jnp.asarray(value, a.dtype), a)
    return out


def check(name: str, backend: str, precision: str, m: int = 5, n: int = 70) -> None:
    fmt = FORMATS[name]
    arrays, x = weights(name, (3, n, columns(name))), rows(m, columns(name))
    want = np.asarray(x, np.float64) @ np.asarray(dequantize(arrays, fmt), np.float64)[1].T
    arrays = poisoned(arrays, 1)
    with jax.default_matmul_precision(precision):
        got = quickly(lambda x, i: quant_matmul(x, arrays, fmt, layer=i, backend=backend))(x, jnp.int32(1))
    assert got.shape == want.shape
    assert got.dtype == jnp.float32
    assert nmse(got, want) <= LIMIT[precision]  # NaN is not


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "interpret") for name in ("Q8_0", "Q4_K", "Q5_1", "Q6_K", "MXFP4", "IQ4_XS", "IQ1_M")),
        *((name, "interpret_tpu") for name in ("Q8_0", "Q2_K", "IQ2_XXS")),
    ],
)
def test_every_kind_of_type(name: str, backend: str) -> None:
    check(name, backend, "bfloat16")


@pytest.mark.parametrize(("name", "backend"), [("Q4_0", "interpret"), ("Q8_0", "interpret"), ("Q8_0", "interpret_tpu")])
def test_float32(name: str, backend: str) -> None:
    check(name, backend, "float32", m=17, n=130)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("backend", INTERPRETED)
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_type(name: str, backend: str, precision: str) -> None:
    check(name, backend, precision, m=17, n=130)


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_become_the_same_numbers_as_in_the_reference(name: str) -> None:
    """The arithmetic by which kernels make values of codes, for every code of every type."""
    fmt = FORMATS[name]
    bits = sum(fmt.planes)
    if bits == 8:
        pytest.skip("a byte is its own value")
    codes = jnp.arange(1 << bits, dtype=jnp.uint32)
    low = codes & ((1 << fmt.planes[0]) - 1)
    words = [(low << 3, 3), (codes >> fmt.planes[0] << 29, 29)][: len(fmt.planes)]
    values = np.array(fmt.table if fmt.table else np.arange(1 << bits) - fmt.bias, np.float64)

    def decoded(one):
        groups = (jnp.float32(0.75), None if fmt.mins is None else jnp.float32(-2.5), None)
        return weigher(groups, fmt)(fraction(words, fmt, one))

    want = 0.75 * values + (0 if fmt.mins is None else -2.5)
    for run in (decoded, jax.jit(decoded)):
        np.testing.assert_array_equal(run(jnp.uint32(ONE)), want)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_a_row_has_the_same_bits_in_any_company(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of columns as programs of their own or one after the other, blocks with more or fewer rows.

    The interpreter's product of matrices, unlike a card's, depends on their shapes: so the blocks are all of one shape.
    """
    fmt, k = FORMATS[name], 2048 + 96
    arrays, x = weights(name, (70, k)), rows(17, k)
    monkeypatch.setattr(gpu, "gpu_blocks", lambda *_: GpuBlocks(16, 64, 4, 1))

    def run(x):
        return np.asarray(quickly(lambda x: quant_matmul(x, arrays, fmt, backend="interpret"))(x))

    many = run(x)
    for m in (1, 5):
        np.testing.assert_array_equal(run(x[:m]), many[:m], err_msg=f"{m} rows")
    monkeypatch.setattr(gpu, "SPLIT_PROGRAMS", 0)
    np.testing.assert_array_equal(run(x), many)


@pytest.mark.parametrize(("name", "backend"), [("Q4_0", "interpret"), ("Q8_0", "interpret"), ("Q8_0", "interpret_tpu")])
def test_experts(name: str, backend: str) -> None:
    """A stack of experts in layers; one expert without rows, one with more than a block, ids out of range."""
    fmt, k = FORMATS[name], 256 + 32
    arrays, x = weights(name, (2, 6, 40, k)), rows(45, k)
    ids = np.random.default_rng(3).integers(-1, 8, 45)
    ids[ids == 2] = 3
    ids[:20] = 4
    clamped = np.clip(ids, 0, 5)
    whole = np.asarray(dequantize(arrays, fmt), np.float64)[1][clamped]
    arrays = poisoned(arrays, 1)
    run = quickly(lambda x, ids, i: expert_matmul(x, ids, arrays, fmt, layer=i, backend=backend))
    got = run(x, jnp.asarray(ids, jnp.int32), jnp.int32(1))
    assert nmse(got, np.einsum("mk,mnk->mn", np.asarray(x, np.float64), whole)) <= LIMIT["bfloat16"]
    same = quickly(lambda x: quant_matmul(x, {q: a[1, 4] for q, a in arrays.items()}, fmt, backend=backend))(x[:16])
    np.testing.assert_array_equal(got[:16], same)


@pytest.mark.parametrize(("m", "experts", "block"), [(1, 4, 16), (7, 3, 4), (100, 8, 16), (64, 1, 16), (33, 64, 2)])
def test_sorting_by_expert(m: int, experts: int, block: int) -> None:
    ids = np.random.default_rng(m).integers(0, experts, m)
    expert, order = map(np.asarray, sort_by_expert(jnp.asarray(ids), experts, block))
    assert order.shape == (len(expert) * block,)
    assert Counter(order[order < m].tolist()) == Counter(range(m))
    for e, members in zip(expert, order.reshape(-1, block)):
        used = members[members < m]
        assert (used.size > 0) == (e < experts)
        assert (ids[used] == e).all()


def test_vmap_and_gradients() -> None:
    fmt, arrays, x = FORMATS["Q8_0"], weights("Q8_0", (2, 24, 64)), rows(6, 64)
    whole = dequantize(arrays, fmt)[1]

    def loss(x):
        return (quant_matmul(x, arrays, fmt, layer=1, backend="interpret") ** 2).sum()

    want = jax.grad(lambda x: (jnp.matmul(x, whole.T, precision="highest") ** 2).sum())(x)
    batched = jax.vmap(jax.grad(loss))
    assert nmse(jax.jit(batched)(x[:, None])[:, 0], want) <= LIMIT["bfloat16"]
    assert str(jax.make_jaxpr(batched)(x[:, None])).count("pallas_call[") == 1


def test_no_rows() -> None:
    arrays = weights("Q4_0", (24, 64))
    for backend in INTERPRETED:
        assert quant_matmul(jnp.zeros((0, 64)), arrays, FORMATS["Q4_0"], backend=backend).shape == (0, 24)


def on(card: str, kind: str = "gpu") -> Any:
    device = AbstractDevice(device_kind=card, num_cores=None, platform=kind)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def exported(
    name: str, shape: tuple[int, ...], m: int, backend: str, platform: str, precision: str = "bfloat16"
) -> str:
    """The program of a matmul with a stack of weights of ``shape`` (with experts, if of four axes), for a platform."""
    fmt = FORMATS[name]
    spec = {key: jax.ShapeDtypeStruct(size, dtype) for key, (size, dtype) in fmt.spec(shape).items()}
    x, number = jax.ShapeDtypeStruct((m, shape[-1]), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)

    def dense(x, arrays, i):
        return quant_matmul(x, arrays, fmt, layer=i, backend=backend)

    def mixture(x, arrays, i):
        return expert_matmul(x, jnp.full(m, i), arrays, fmt, layer=i, backend=backend)

    program = jax.jit(dense if len(shape) == 3 else mixture)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
    with jax.default_matmul_precision(precision):
        return jax.export.export(program, platforms=[platform], disabled_checks=allowed)(x, spec, number).mlir_module()


def largest_float(module: str) -> int:
    """Elements of the largest float array of a program that is no argument of it."""
    body = "\n".join(line for line in module.splitlines() if "func.func" not in line and "custom_call" not in line)
    shapes = re.findall(r"tensor<((?:\d+x)+)(?:bf16|f32)>", body)
    return max(int(np.prod([int(d) for d in shape.split("x")[:-1]])) for shape in shapes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("card", list(CARDS))
@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cards(name: str, card: str) -> None:
    with on(CARDS[card]):
        module = exported(name, (4, 2048, 1024), 4, "gpu", "cuda")
    assert module.count(f"@{TRITON}") == 1
    assert largest_float(module) <= 4 * 2048


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_more_cases_lower_for_cards(name: str) -> None:
    with on(CARDS["sm90"]):
        for shape, m, precision in [
            ((2, 300, 1056), 1, "bfloat16"),  # odd sizes
            ((2, 8192, 4096), 3000, "bfloat16"),  # segments one after the other
            ((2, 512, 1024), 200, "float32"),
            ((2, 8, 512, 1024), 64, "bfloat16"),  # experts
        ]:
            module = exported(name, shape, m, "gpu", "cuda", precision)
            assert module.count(f"@{TRITON}") == 1


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_tpus(name: str) -> None:
    module = exported(name, (4, 2048, 1024), 4, "tpu", "tpu")
    assert module.count("@tpu_custom_call") == 1
    assert largest_float(module) <= 4 * 2048


def test_more_cases_lower_for_tpus() -> None:
    for shape, m, precision in [
        ((2, 300, 1056), 1, "bfloat16"),
        ((2, 512, 1024), 300, "float32"),
        ((2, 8, 512, 1024), 64, "bfloat16"),
    ]:
        assert exported("Q4_0", shape, m, "tpu", "tpu", precision).count("@tpu_custom_call") == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("shape", [(4, 200, 1280), (2, 4096, 4096), (2, 8, 256, 512)])
@pytest.mark.parametrize("name", QUANTIZED)
def test_compiles_for_tpus(name: str, shape: tuple[int, ...]) -> None:
    from jax.experimental import topologies

    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    fmt = FORMATS[name]
    spec = {key: jax.ShapeDtypeStruct(size, dtype) for key, (size, dtype) in fmt.spec(shape).items()}

    def run(x, arrays, i):
        if len(shape) == 4:
            return expert_matmul(x, jnp.full(x.shape[0], i), arrays, fmt, layer=i, backend="tpu")
        return quant_matmul(x, arrays, fmt, layer=i, backend="tpu")

    program = jax.jit(run, in_shardings=place, out_shardings=place)
    for m in (1, 130):
        traced = program.trace(
            jax.ShapeDtypeStruct((m, shape[-1]), jnp.float32), spec, jax.ShapeDtypeStruct((), jnp.int32)
        )
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 16 << 20  # no copy of the stack, no dequantized weight


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_auto_takes_the_platforms_kernel() -> None:
    with on(CARDS["sm90"]):
        assert exported("Q4_0", (2, 64, 256), 1, "auto", "cuda").count(f"@{TRITON}") == 1
        assert TRITON not in exported("F16", (2, 64, 256), 1, "auto", "cuda")
    with on("Tesla T4"):
        assert TRITON not in exported("Q4_0", (2, 64, 256), 1, "auto", "cuda")
    with on("TPU v5 lite", "tpu"):
        assert exported("Q4_0", (2, 64, 256), 1, "auto", "tpu").count("@tpu_custom_call") == 1
    assert "custom_call" not in exported("Q4_0", (2, 64, 256), 1, "auto", "cpu").replace("@Sharding", "")


def test_what_is_refused() -> None:
    x = rows(2, 64)
    for backend in ("gpu", "tpu", *INTERPRETED):
        with pytest.raises(UnsupportedError, match=f"{backend!r} does not take this F16 weight: F16 is not packed"):
            quant_matmul(x, weights("F16", (24, 64)), FORMATS["F16"], backend=backend)
    if native.unsupported(FORMATS["Q8_0"]) is None:
        tiles = native.tile({q: np.asarray(a) for q, a in weights("Q8_0", (24, 64)).items()}, FORMATS["Q8_0"])
        with pytest.raises(UnsupportedError, match="reads weights as rows, and these are tiles"):
            quant_matmul(x, tiles, FORMATS["Q8_0"], n=24, backend="gpu")
    with (
        on("Tesla T4"),
        pytest.raises(UnsupportedError, match=r"compute capability 7\.5, and Triton's kernels need 8\.0"),
    ):
        exported("Q4_0", (2, 64, 256), 1, "gpu", "cuda")
    with on(CARDS["sm90"]), pytest.raises(UnsupportedError, match="codes has 2147483648 elements in at most 4 GiB"):
        exported("Q8_0", (32, 16384, 4096), 1, "gpu", "cuda")


def test_block_sizes_are_chosen_by_card_and_rows() -> None:
    assert gpu_blocks(1, False, 90).rows == 16
    assert gpu_blocks(17, False, 90).rows == 32
    assert gpu_blocks(5000, False, 90) == gpu_blocks(128, False, 103)
    assert gpu_blocks(5000, False, None) == gpu_blocks(5000, False, 86) == GpuBlocks(64, 64, 4, 2)
