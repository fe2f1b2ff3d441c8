"""Matmul with packed weights: exactness, row invariance bit for bit, vmap, scan, gradients, experts, temporaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quant_matmul import (
    FORMATS,
    UnsupportedError,
    dequantize,
    expert_matmul,
    quant_matmul,
    xla,
)
from realm_jax.errors import BackendError
from realm_jax.quant import QuantizedTensor, packed_spec

QUANTIZED = sorted(name for name, f in FORMATS.items() if not f.dense)
FLOATS = ["F32", "F16", "BF16"]


def weights(name: str, shape: tuple[int, ...], seed: int = 0) -> dict[str, jax.Array]:
    """A random packed weight with moderate scales."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for key, (size, dtype) in packed_spec(shape, name).items():
        if key == "scales" and FORMATS[name].scale in ("e8m0", "ue4m3"):
            middle = 120 if FORMATS[name].scale == "e8m0" else 48
            arrays[key] = jnp.asarray(rng.integers(middle, middle + 8, size, dtype=np.uint8))
        elif dtype.kind in "iu":
            info = np.iinfo(dtype)
            if key in ("scales", "mins") and FORMATS[name].scale == "u8":  # of six bits
                arrays[key] = jnp.asarray(rng.integers(0, 64, size, dtype=dtype))
                continue
            arrays[key] = jnp.asarray(rng.integers(info.min, info.max, size, dtype=dtype, endpoint=True))
        else:
            arrays[key] = jnp.asarray(rng.normal(size=size).astype(np.float32), dtype)
    return arrays


def rows(m: int, k: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(m, k)).astype(np.float32))


def nmse(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(((got - want) ** 2).sum() / (want**2).sum())


def dots(jaxpr) -> int:
    """dot_general equations in a jaxpr, inner ones included."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general"
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            count += dots(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, the last overlapping, from weights of a few hundred rows."""
    monkeypatch.setattr(xla, "TILE_BYTES", 64 << 10)


@pytest.mark.parametrize("name", [*FLOATS, *QUANTIZED])
def test_matmul(name, small_tiles):
    arrays, x = weights(name, (3, 100, 512)), rows(5, 512)
    whole = np.asarray(dequantize(arrays, FORMATS[name]), np.float64)
    got = jax.jit(lambda x, layer: quant_matmul(x, arrays, FORMATS[name], layer=layer))(x, 2)
    assert nmse(got, np.asarray(x, np.float64) @ whole[2].T) < 1e-12
    one = {key: a[1] for key, a in arrays.items()}
    assert nmse(quant_matmul(x[0], one, FORMATS[name]), np.asarray(x[0], np.float64) @ whole[1].T) < 1e-12


def check_rows(name: str, n: int, k: int, counts: tuple[int, ...]) -> None:
    arrays, x = weights(name, (2, n, k)), rows(max(counts), k)
    op = jax.jit(lambda x: quant_matmul(x, arrays, FORMATS[name], layer=jnp.int32(1)))
    want = np.asarray(op(x))
    for m in counts:
        np.testing.assert_array_equal(np.asarray(op(x[:m])), want[:m], err_msg=f"{m} rows")
    for i in (1, 7, max(counts) - 1):
        np.testing.assert_array_equal(np.asarray(op(x[i : i + 1])), want[i : i + 1], err_msg=f"row {i} alone")


@pytest.mark.parametrize(
    ("name", "n", "k"),
    [("Q4_1", 2000, 576), ("Q4_K", 520, 2048), ("F32", 1, 576), ("F16", 8, 64), ("F32", 3, 8192), ("Q6_K", 60, 4096)],
)
def test_a_row_has_the_same_bits_in_any_company(name, n, k):
    check_rows(name, n, k, (1, 2, 5, 8, 33, 128))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 16, 60, 130, 576, 2048])
@pytest.mark.parametrize("k", [64, 576, 1536, 2048, 8192, 14336])
def test_a_row_has_the_same_bits_in_any_company_at_more_shapes(n, k):
    counts = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 100, 128, 129, 200, 256, 300, 512)
    check_rows("Q8_0", n, k, counts)


@pytest.mark.parametrize("name", ["Q4_K", "F32", "IQ2_XXS"])
def test_vmap_is_one_matmul_over_all_rows(name, small_tiles):
    arrays, x = weights(name, (2, 100, 256)), rows(12, 256).reshape(2, 3, 2, 256)

    def one(x):
        return quant_matmul(x, arrays, FORMATS[name], layer=1)

    flat = jax.jit(one)(x.reshape(12, 256)).reshape(2, 3, 2, 100)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(one)))(x), flat)
    np.testing.assert_array_equal(jax.jit(jax.vmap(one, in_axes=1, out_axes=1))(x), flat)
    jaxpr = jax.make_jaxpr(jax.vmap(jax.vmap(one)))(x).jaxpr
    text = str(jaxpr)
    assert dots(jaxpr) == 1
    assert "f32[12,256]" in text  # all rows in one call
    assert dots(jax.make_jaxpr(one)(x).jaxpr) == 1


def test_vmap_over_weights_goes_one_by_one():
    arrays, x = weights("Q4_0", (3, 40, 64)), rows(3, 64)
    got = jax.vmap(lambda x, w: quant_matmul(x, w, FORMATS["Q4_0"]))(x, arrays)
    want = jnp.stack([quant_matmul(x[i], {k: a[i] for k, a in arrays.items()}, FORMATS["Q4_0"]) for i in range(3)])
    np.testing.assert_array_equal(got, want)
    layers = jax.vmap(lambda layer: quant_matmul(x[0], arrays, FORMATS["Q4_0"], layer=layer))(jnp.arange(3))
    want = jnp.stack([quant_matmul(x[0], arrays, FORMATS["Q4_0"], layer=i) for i in range(3)])
    np.testing.assert_array_equal(layers, want)


def test_scan_over_layers(small_tiles):
    fmt, arrays, x = FORMATS["Q5_K"], weights("Q5_K", (4, 256, 256)), rows(3, 256)

    def step(x, layer):
        y = quant_matmul(x, arrays, fmt, layer=layer)
        return y / jnp.abs(y).max(), None

    def forward(x):
        return jax.lax.scan(step, x, jnp.arange(4, dtype=jnp.int32))[0]

    want = x
    for i in range(4):
        want = step(want, i)[0]
    assert nmse(jax.jit(forward)(x), want) < 1e-11
    batched = jax.jit(jax.vmap(forward))(x[:, None])[:, 0]
    assert batched.shape == want.shape
    assert dots(jax.make_jaxpr(jax.vmap(forward))(x[:, None]).jaxpr) == 1


def test_gradients(small_tiles):
    fmt, arrays, x = FORMATS["Q4_K"], weights("Q4_K", (2, 100, 256)), rows(5, 256)
    whole = dequantize(arrays, fmt)[1]

    def loss(x):
        return (quant_matmul(x, arrays, fmt, layer=1) ** 2).sum()

    want = jax.grad(lambda x: (jnp.matmul(x, whole.T, precision="highest") ** 2).sum())(x)
    assert nmse(jax.jit(jax.grad(loss))(x), want) < 1e-11
    assert nmse(jax.jit(jax.vmap(jax.grad(loss)))(x[:, None])[:, 0], want) < 1e-11
    by_weight = jax.grad(lambda x, a: (quant_matmul(x, a, fmt, layer=1) ** 2).sum(), allow_int=True, argnums=(0, 1))
    by_x, by_arrays = by_weight(x, arrays)
    assert nmse(by_x, want) < 1e-11
    assert all(not np.asarray(g, np.float32).any() for g in jax.tree.leaves(by_arrays) if g.dtype != jax.dtypes.float0)


@pytest.mark.parametrize("name", ["Q4_K", "MXFP4", "BF16"])
def test_experts_are_picked_per_row_with_the_same_bits_in_any_company(name):
    fmt, arrays, x = FORMATS[name], weights(name, (2, 8, 72, 256)), rows(150, 256)
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 8, 150), jnp.int32)
    ids = jnp.where(ids == 5, 4, ids)  # one expert without rows
    op = jax.jit(lambda x, ids: expert_matmul(x, ids, arrays, fmt, layer=jnp.int32(1)))
    many = np.asarray(op(x, ids))
    for i in range(0, 150, 10):
        weight = {key: a[1, ids[i]] for key, a in arrays.items()}
        np.testing.assert_array_equal(quant_matmul(x[i : i + 1], weight, fmt), many[i : i + 1])
    for part in (slice(0, 1), slice(3, 5), slice(10, 43)):
        np.testing.assert_array_equal(op(x[part], ids[part]), many[part])
    same = np.asarray(op(x, jnp.full(150, 3, jnp.int32)))
    np.testing.assert_array_equal(same, quant_matmul(x, {key: a[1, 3] for key, a in arrays.items()}, fmt))
    batched = jax.jit(jax.vmap(lambda x, ids: expert_matmul(x, ids, arrays, fmt, layer=1)))
    np.testing.assert_array_equal(batched(x.reshape(30, 5, 256), ids.reshape(30, 5)).reshape(150, 72), many)


def test_expert_gradients_and_vmap():
    fmt, arrays, x = FORMATS["Q8_0"], weights("Q8_0", (4, 24, 64)), rows(12, 64)
    ids = jnp.array([0, 1, 3, 3, 0, 2, 1, 1, 0, 3, 2, 0], jnp.int32)
    whole = dequantize(arrays, fmt)

    def loss(x, ids):
        return (expert_matmul(x, ids, arrays, fmt) ** 2).sum()

    want = jax.grad(lambda x: (jnp.einsum("mk,mnk->mn", x, whole[ids], precision="highest") ** 2).sum())(x)
    got = jax.jit(jax.vmap(jax.grad(loss)))(x.reshape(4, 3, 64), ids.reshape(4, 3))
    assert nmse(got.reshape(12, 64), want) < 1e-11
    shared = jax.vmap(lambda ids: expert_matmul(x[:3], ids, arrays, fmt))(ids.reshape(4, 3))
    assert nmse(shared[1], jnp.einsum("mk,mnk->mn", x[:3], whole[ids[3:6]])) < 1e-11
    assert (
        dots(jax.make_jaxpr(jax.vmap(lambda x, i: expert_matmul(x, i, arrays, fmt)))(x[:, None], ids[:, None]).jaxpr)
        == 1
    )


def test_no_full_precision_copy_of_a_large_weight():
    """8 stacked layers of 4096 x 2048, 36 MB packed, 268 MB as float32: temporaries stay near one tile."""
    fmt = FORMATS["Q4_K"]
    spec = {
        key: jax.ShapeDtypeStruct(size, dtype) for key, (size, dtype) in packed_spec((8, 4096, 2048), "Q4_K").items()
    }
    x = jax.ShapeDtypeStruct((8, 2048), jnp.float32)

    def forward(x, arrays):
        def step(total, layer):
            return total + quant_matmul(x, arrays, fmt, layer=layer), None

        return jax.lax.scan(step, jnp.zeros((8, 4096)), jnp.arange(8, dtype=jnp.int32))[0]

    memory = jax.jit(forward).lower(x, spec).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16 << 20


def test_what_is_refused():
    arrays, x = weights("Q8_0", (24, 64)), rows(2, 64)
    with pytest.raises(UnsupportedError, match="'cuda' is not available for quant_matmul; accepted: auto, native, gpu"):
        quant_matmul(x, arrays, FORMATS["Q8_0"], backend="cuda")
    with pytest.raises(BackendError, match="'pallas'"):
        QuantizedTensor(arrays, "Q8_0").matmul(x, backend="pallas")
    with pytest.raises(BackendError, match="'pallas'"):
        QuantizedTensor(weights("Q8_0", (2, 24, 64)), "Q8_0").expert_matmul(x, jnp.zeros(2, int), backend="pallas")
    with pytest.raises(ValueError, match="x has 64 columns, the weight 96"):
        quant_matmul(x, weights("Q8_0", (24, 96)), FORMATS["Q8_0"])
    with pytest.raises(ValueError, match="expected 3 axes"):
        quant_matmul(x, arrays, FORMATS["Q8_0"], layer=0)
    with pytest.raises(ValueError, match="expert_ids has shape \\(3,\\), expected \\(2,\\)"):
        expert_matmul(x, jnp.zeros(3, int), weights("Q8_0", (2, 24, 64)), FORMATS["Q8_0"])
