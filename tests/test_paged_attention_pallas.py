"""The Pallas kernels of paged attention: interpreted on the CPU, lowered for cards and TPUs that are not there."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from triton_compiler import SHARED_MEMORY, compile_kernels

from pallas_kernels.paged_attention import PAGE_SIZE, Case, KVPages, UnsupportedError, gpu, reference, tiles, tpu
from pallas_kernels.paged_attention import append_rows as append
from pallas_kernels.paged_attention import paged_attention as attend

CARDS = {"NVIDIA A100-SXM4-80GB": 80, "NVIDIA GeForce RTX 4090": 89, "NVIDIA H100 80GB HBM3": 90}
TRITON = "__gpu$xla.gpu.triton"


@dataclass(frozen=True)
class Problem:
    """Sequences that have had `lengths` tokens, of which the last `tokens` are the queries, padded by one."""

    dtype: str = "float32"
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    value_dim: int = 32
    tokens: int = 1
    lengths: tuple[int, ...] = (70, 300)
    softcap: float = 0.0
    sinks: bool = False
    window: int = 0
    latent: bool = False
    pages: int = 8  # of a table

    def arrays(self, seed: int = 0) -> tuple[Any, ...]:
        """(queries, pool, tables, positions, sinks). What no query may see is NaN, in the pool and in the queries."""
        rng = np.random.default_rng(seed)
        batch, count = len(self.lengths), len(self.lengths) * self.pages + 2
        tables = rng.permutation(count)[: batch * self.pages].reshape(batch, self.pages).astype(np.int32)
        seen = np.zeros((count, PAGE_SIZE), bool)
        for table, length in zip(tables, self.lengths, strict=True):
            first = max(0, length - self.tokens - self.window + 1) if self.window else 0
            for position in range(first, length):
                seen[table[position // PAGE_SIZE], position % PAGE_SIZE] = True

        def rows(dim: int) -> tuple[np.ndarray, np.ndarray | None]:
            values = rng.standard_normal((2, count, self.kv_heads, PAGE_SIZE, dim)).astype(np.float32)
            values, scales = reference.quantize_rows(jnp.asarray(values), jnp.dtype(self.dtype))
            hidden = ~seen[None, :, None, :]
            poison = 99 if self.dtype == "int8" else jnp.nan
            values = jnp.where(hidden[..., None], jnp.asarray(poison, values.dtype), values)
            return values, None if scales is None else jnp.where(hidden, jnp.nan, scales)

        keys, key_scales = rows(self.dim)
        values, value_scales = rows(0 if self.latent else self.value_dim)
        pool = KVPages(keys, values, key_scales, value_scales)
        positions = np.full((batch, self.tokens + 1), -1, np.int32)
        q = np.full((batch, self.tokens + 1, self.heads, self.dim), np.nan, np.float32)
        for i, length in enumerate(self.lengths):
            new = min(self.tokens, length)
            positions[i, :new] = np.arange(length - new, length)
            q[i, :new] = 2 * rng.standard_normal((new, self.heads, self.dim))
        sinks = jnp.asarray(3 * rng.standard_normal(self.heads), jnp.float32) if self.sinks else None
        return jnp.asarray(q), pool, jnp.asarray(tables), jnp.asarray(positions), sinks

    @property
    def static(self) -> dict[str, Any]:
        return {"scale": self.dim**-0.5, "softcap": self.softcap, "value_dim": self.value_dim}

    def run(self, module: ModuleType, arrays: tuple[Any, ...], blocks: int | None = None, **options: Any) -> np.ndarray:
        *operands, sinks = arrays
        blocks = self.pages // 2 if blocks is None else blocks
        scalars = {"layer": jnp.int32(1), "blocks": jnp.int32(blocks), "window": jnp.int32(self.window)}
        run = jax.jit(partial(module.paged_attention, interpret=True, **self.static, **options))
        return np.asarray(run(*operands, sinks=sinks, **scalars))

    def expected(self, arrays: tuple[Any, ...]) -> np.ndarray:
        *operands, sinks = arrays
        out = reference.paged_attention(*operands, layer=1, window=self.window, sinks=sinks, **self.static)
        return np.asarray(out)


def error(ours: np.ndarray, problem: Problem, arrays: tuple[Any, ...]) -> float:
    """Normalised mean square error over the queries that are none of the padding; a sequence without any gets zeros."""
    valid = np.asarray(arrays[3]) >= 0
    np.testing.assert_array_equal(ours[~valid.any(1)], 0.0)
    ours, exact = ours[valid], problem.expected(arrays)[valid]
    return float(((ours - exact) ** 2).sum() / (exact**2).sum())


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks in a step of the interpreted TPU kernel, which takes long to compile with more."""
    monkeypatch.setattr(tpu, "TPU", replace(tiles.TPU, step_blocks=2))


BOUND = {"float32": 1e-11, "float16": 1e-6, "bfloat16": 5e-6, "int8": 1e-5}
GPU = {
    "grouped, a token or none": (Problem(lengths=(70, 0, 300)), True),
    "float16, window": (Problem("float16", tokens=20, window=60), False),
    "bfloat16, window, sinks, soft-cap": (Problem("bfloat16", window=150, sinks=True, softcap=9.0), True),
    "int8, sinks, soft-cap": (Problem("int8", heads=6, tokens=3, sinks=True, softcap=9.0), False),
    "int8, one token, window": (Problem("int8", heads=1, kv_heads=1, window=90), True),
    "odd head sizes": (Problem(heads=3, kv_heads=1, dim=41, value_dim=24, tokens=30), True),
    "latent": (Problem("float16", heads=5, kv_heads=1, dim=72, value_dim=56, latent=True), False),
}
TPU = {
    "grouped, a chunk or none, window": Problem(tokens=20, heads=6, window=60, lengths=(70, 0, 300)),
    "bfloat16, window, sinks, soft-cap": Problem("bfloat16", window=150, sinks=True, softcap=9.0),
    "int8, sinks, odd": Problem("int8", heads=3, kv_heads=1, dim=24, value_dim=40, tokens=3, sinks=True, window=90),
    "latent": Problem("bfloat16", heads=5, kv_heads=1, dim=72, value_dim=56, latent=True),
}


@pytest.mark.parametrize("name", GPU)
def test_the_gpu_kernels_agree_with_the_reference(name: str) -> None:
    problem, split = GPU[name]
    arrays = problem.arrays()
    assert error(problem.run(gpu, arrays, split=split), problem, arrays) < BOUND[problem.dtype]


@pytest.mark.parametrize("name", TPU)
def test_the_tpu_kernel_agrees_with_the_reference(name: str) -> None:
    problem = TPU[name]
    arrays = problem.arrays()
    assert error(problem.run(tpu, arrays), problem, arrays) < BOUND[problem.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_latent_pages_agree_with_the_reference(dtype: str) -> None:
    problem = Problem(dtype, heads=16, kv_heads=1, dim=192, value_dim=128, tokens=3, latent=True)
    arrays = problem.arrays()
    assert error(problem.run(gpu, arrays, split=True), problem, arrays) < BOUND[dtype]
    if dtype != "float16":
        assert error(problem.run(tpu, arrays), problem, arrays) < BOUND[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("dims", [(64, 64), (80, 72), (128, 128), (192, 128), (256, 256)])
def test_real_head_sizes_agree_with_the_reference(dims: tuple[int, int], dtype: str) -> None:
    for tokens, window in ((1, 0), (130, 200)):
        problem = Problem(dtype, 6, 2, *dims, tokens, (200, 700), window=window, sinks=True, pages=12)
        arrays = problem.arrays()
        assert error(problem.run(gpu, arrays, split=True), problem, arrays) < BOUND[dtype]
        assert error(problem.run(gpu, arrays, split=False), problem, arrays) < BOUND[dtype]
        if dtype != "float16":
            assert error(problem.run(tpu, arrays), problem, arrays) < BOUND[dtype]


@pytest.mark.parametrize(("dtype", "window"), [("float16", 300), pytest.param("float32", 0, marks=pytest.mark.slow)])
def test_gpu_bits_do_not_depend_on_form_chunk_batch_table_or_blocks(dtype: str, window: int) -> None:
    problem = Problem(dtype, tokens=70, lengths=(650, 650), window=window, sinks=True, pages=12)  # three parts
    q, pool, tables, positions, sinks = problem.arrays()
    whole = problem.run(gpu, (q, pool, tables, positions, sinks), split=True)[:, :70]
    other = problem.run(gpu, (q, pool, tables, positions, sinks), split=False)[:, :70]
    np.testing.assert_array_equal(other, whole)
    last = (q[1:, 69:70], pool, tables[1:], positions[1:, 69:70], sinks)  # a token, alone
    np.testing.assert_array_equal(problem.run(gpu, last, split=True), whole[1:, 69:])
    short = (q[:, 20:23], pool, tables[:, :10], positions[:, 20:23], sinks)
    np.testing.assert_array_equal(problem.run(gpu, short, blocks=5, split=True), whole[:, 20:23])


def test_tpu_bits_do_not_depend_on_batch_table_or_blocks() -> None:
    problem = Problem(tokens=7, lengths=(290, 300), window=200, pages=12)
    q, pool, tables, positions, sinks = problem.arrays()
    whole = problem.run(tpu, (q, pool, tables, positions, sinks))[:, :7]
    alone = (q[1:], pool, tables[1:, :6], positions[1:], sinks)
    np.testing.assert_array_equal(problem.run(tpu, alone, blocks=3)[:, :7], whole[1:])


def test_through_the_api_under_vmap() -> None:
    """One sequence under vmap over a pool that is carried, rows being appended first."""
    problem = Problem("float16", tokens=1, lengths=(70, 130))
    q, pool, tables, positions, _ = problem.arrays()
    q, positions = q[:, :1], positions[:, :1]
    k, v = np.random.default_rng(1).standard_normal((2, 2, 1, problem.kv_heads, problem.dim)).astype(np.float32)

    def one(pool: KVPages, q: Any, k: Any, v: Any, table: Any, position: Any) -> tuple[Any, KVPages]:
        pool = append(pool, k, v, table, position, layer=1, backend="interpret")
        options = {"layer": 1, "blocks": 4, "window": 0, **problem.static}
        return attend(q, pool, table, position, backend="interpret", **options), pool

    run = jax.jit(jax.vmap(one, (None, 0, 0, 0, 0, 0), (0, None)))
    out, pool = run(pool, q, k, v, tables, positions)
    arrays = (q, pool, tables, positions, None)
    assert error(np.asarray(out), problem, arrays) < BOUND["float16"]
    assert np.isfinite(np.asarray(out)).all()
    for i, position in enumerate(np.asarray(positions)[:, 0]):
        page = np.asarray(tables)[i, position // PAGE_SIZE]
        np.testing.assert_array_equal(pool.keys[1, page, :, position % PAGE_SIZE], k[i, 0].astype(np.float16))


# Shapes of real models: heads, key/value heads, head sizes of keys and values, soft-cap, sinks, latent.
MODELS: dict[str, tuple[int, int, int, int, float, bool, bool]] = {
    "llama 8b": (32, 8, 128, 128, 0.0, False, False),
    "smollm2": (9, 3, 64, 64, 0.0, False, False),
    "gemma2": (8, 4, 256, 256, 50.0, False, False),
    "gpt-oss": (64, 8, 64, 64, 0.0, True, False),
    "phi 2": (32, 32, 80, 80, 0.0, False, False),
    "latent": (16, 1, 192, 128, 0.0, False, True),
}


def abstract(
    model: str, dtype: str, batch: int, tokens: int, sharding: Any = None
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """(operands, their keywords, static keywords) of paged_attention for a model."""
    heads, kv_heads, dim, value_dim, softcap, sinks, latent = MODELS[model]
    shape = partial(jax.ShapeDtypeStruct, sharding=sharding)
    pages = (2, 64, kv_heads, PAGE_SIZE)
    scales = shape(pages, jnp.float32) if dtype == "int8" else None
    pool = KVPages(shape((*pages, dim), dtype), shape((*pages, 0 if latent else value_dim), dtype), scales, scales)
    operands = (
        shape((batch, tokens, heads, dim), jnp.float32),
        pool,
        shape((batch, 64), jnp.int32),
        shape((batch, tokens), jnp.int32),
    )
    scalars = {name: shape((), jnp.int32) for name in ("layer", "blocks", "window")}
    keywords = {**scalars, "sinks": shape((heads,), jnp.float32) if sinks else None}
    return operands, keywords, {"scale": dim**-0.5, "softcap": softcap, "value_dim": value_dim}


def lowered(card: str, model: str, dtype: str, batch: int, tokens: int) -> str:
    """The program for a card that is not there, as text."""
    operands, keywords, static = abstract(model, dtype, batch, tokens)
    device = AbstractDevice(device_kind=card, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    run = jax.jit(lambda *args, **rest: attend(*args, backend="gpu", **static, **rest))
    allowed = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(run, platforms=["cuda"], disabled_checks=allowed)(*operands, **keywords)
    return exported.mlir_module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("model", "dtype"), [("llama 8b", "float16"), ("gpt-oss", "int8"), ("latent", "bfloat16")])
def test_lowers_for_cards(card: str, model: str, dtype: str) -> None:
    decode = lowered(card, model, dtype, 1, 1)
    assert decode.count(f"custom_call @{TRITON}") == 2  # the parts, and their merging
    prefill = lowered(card, model, dtype, 16, 128)
    assert prefill.count(f"custom_call @{TRITON}") == 1
    for text in (decode, prefill):  # pages are read where they lie
        assert "stablehlo.gather" not in text
        assert "stablehlo.dynamic_slice" not in text


@pytest.mark.parametrize(("model", "dtype"), [("llama 8b", "bfloat16"), ("gpt-oss", "int8"), ("latent", "float32")])
def test_lowers_for_tpus(model: str, dtype: str) -> None:
    for tokens in (1, 128):
        operands, keywords, static = abstract(model, dtype, 2, tokens)
        run = jax.jit(lambda *args, static=static, **rest: attend(*args, backend="tpu", **static, **rest))
        text = jax.export.export(run, platforms=["tpu"])(*operands, **keywords).mlir_module()
        assert text.count("custom_call @tpu_custom_call") == 1
        assert "stablehlo.gather" not in text


def test_what_does_not_fit_is_refused_by_name() -> None:
    case = Case(1, 1, 8, 2, 128, 128, False, np.dtype(np.float16))
    assert gpu.unsupported(case) is None
    assert "float16" in str(tpu.unsupported(case))
    assert tpu.unsupported(replace(case, dtype=np.dtype(np.int8))) is None
    assert "536870912 bytes" in str(
        tpu.unsupported(replace(case, kv_heads=1 << 13, dtype=np.dtype(np.int8), head_dim=384))
    )
    assert "576 (keys) and 512 (values)" in str(
        gpu.unsupported(replace(case, head_dim=576, value_dim=512, latent=True))
    )
    mesh = partial(AbstractMesh, (1,), ("x",), axis_types=(AxisType.Auto,))
    device = partial(AbstractDevice, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(mesh(abstract_device=device(device_kind="Tesla T4"))):
        assert "7.5" in str(gpu.unsupported(case))
    with jax.sharding.use_abstract_mesh(mesh(abstract_device=device(device_kind="NVIDIA GeForce RTX 4090"))):
        assert gpu.unsupported(replace(case, head_dim=256)) is None
        assert "float32" in str(gpu.unsupported(replace(case, head_dim=256, dtype=np.dtype(np.float32))))


def test_int8_pools_whose_offsets_triton_wraps_are_refused() -> None:
    operands, keywords, static = abstract("llama 8b", "int8", 1, 1)
    shape = (16, 3000, 8, PAGE_SIZE)
    pages, scales = jax.ShapeDtypeStruct((*shape, 128), jnp.int8), jax.ShapeDtypeStruct(shape, jnp.float32)
    operands = (operands[0], KVPages(pages, pages, scales, scales), *operands[2:])
    with pytest.raises(UnsupportedError, match=r"keys of the pool are int8 .*3000"):
        jax.eval_shape(partial(gpu.paged_attention, **static), *operands, **keywords)


@pytest.mark.parametrize("capability", [None, 75, 80, 86, 89, 90, 100, 103, 120, 121])
def test_tiles_of_a_card_use_one_instruction(capability: int | None) -> None:
    for float32 in (False, True):
        for head in (8, 64, 65, 128) if float32 else (8, 64, 65, 128, 192):
            few, many = tiles.tiles(capability, head, float32)
            assert few.rows <= many.rows
            assert few.rows % 16 == 0
            if capability in (90, 100, 103):
                assert (few.rows < 64) == (many.rows < 64)
    assert tiles.tiles(capability, 257, False) is None


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2x1"])
def test_compiles_for_tpus(topology: str) -> None:
    """By libtpu, which needs no TPU for it."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for model in MODELS:
        for dtype, tokens in (("bfloat16", 1), ("int8", 1), ("float32", 3), ("bfloat16", 128)):
            operands, keywords, static = abstract(model, dtype, 2, tokens, sharding)
            jax.jit(partial(tpu.paged_attention, **static)).lower(*operands, **keywords).compile()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("card", CARDS)
def test_compiles_for_cards(card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own compiler, where that is installed: shared memory fits, products are the tensor cores', and pages
    are loaded while others are summed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    capability = CARDS[card]
    for model in MODELS:
        for dtype, batch, tokens in (("float16", 1, 1), ("int8", 1, 1), ("bfloat16", 8, 128), ("float32", 8, 1)):
            sizes = tiles.tiles(capability, MODELS[model][2], dtype == "float32")
            if sizes is None:
                continue
            compiled = compile_kernels(lowered(card, model, dtype, batch, tokens), capability, tmp_path)
            for name, kernel in compiled.items():
                assert kernel.metadata.shared <= SHARED_MEMORY[capability], (name, model, dtype)
            compiled.pop("paged_attention_merge", None)
            [kernel] = compiled.values()
            code = kernel.asm["ptx"]
            assert ("wgmma.mma_async" if sizes[0].rows >= 64 else "mma.sync") in code, (model, dtype)
            assert ("cp.async" in code) == (kernel.metadata.num_stages > 1), (model, dtype)
