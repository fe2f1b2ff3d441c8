"""Normalization, gated activations and the largest of a row: every backend and instruction set against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.row_ops import ACTIVATIONS, UnsupportedError, api, argmax, gated, rms_norm, top_mask

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
ISAS = native.ISAS[: native.isa() + 1] if native.available() else ()
EITHER = "native" if native.available() else "xla"


@pytest.fixture(params=["xla", *ISAS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "xla":
        return "xla"
    monkeypatch.setattr("pallas_kernels.row_ops.native.isa", lambda: native.ISAS.index(request.param))
    return "native"


def rows(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32))


def nmse(got: jax.Array, want: np.ndarray) -> float:
    return float(((np.asarray(got, np.float64) - want) ** 2).sum() / (want**2).sum())


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def exact_gated(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
    if activation == "silu":
        return gate * sigmoid(gate) * up
    if activation == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate * sigmoid(1.702 * gate) * (up + 1)


@pytest.mark.parametrize("k", [1, 15, 16, 17, 64, 79, 576, 2048, 20_001])
def test_rms_norm(k: int, backend: str) -> None:
    x, weights = 3 * rows(5, k), rows(3, k, seed=1)
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weights[1], np.float64)
    assert nmse(rms_norm(x, weights, 1e-5, layer=1, backend=backend), want) < 1e-12
    assert nmse(jax.jit(lambda x, w, i: rms_norm(x, w, 1e-5, layer=i, backend=backend))(x, weights, 1), want) < 1e-12
    assert nmse(rms_norm(x, weights[1], 1e-5, backend=backend), want) < 1e-12
    mapped = jax.vmap(lambda x, i: rms_norm(x, weights, 1e-5, layer=i, backend=backend), in_axes=(0, None))
    assert nmse(mapped(x[:, None], 1)[:, 0], want) < 1e-12


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 20_001)], ids=str)
def test_gated(shape: tuple[int, ...], activation: str, backend: str) -> None:
    gate, up = 4 * rows(*shape), 4 * rows(*shape, seed=1)
    want = exact_gated(np.asarray(gate, np.float64), np.asarray(up, np.float64), activation)
    assert nmse(gated(gate, up, activation, backend=backend), want) < 1e-12
    mapped = jax.vmap(lambda gate: gated(gate, up, activation, backend=backend))(gate[None])
    assert nmse(mapped[0], want) < 1e-12


def test_extremes_of_activations(backend: str) -> None:
    gate = jnp.asarray([-1e30, -200.0, 0.0, 200.0, 1e30, np.nan, np.inf], jnp.float32)
    out = gated(gate, jnp.ones(7), "silu", backend=backend)
    np.testing.assert_allclose(out[2:5], [0.0, 200.0, 1e30], rtol=1e-6)
    assert abs(out[1]) < 1e-30
    assert np.isnan(out[5])
    assert out[6] == np.inf


def test_bits_of_a_row_do_not_depend_on_the_others(backend: str) -> None:
    x, weight, up = rows(131, 577), rows(577, seed=1), rows(131, 577, seed=2)
    norm = jax.jit(lambda x: rms_norm(x, weight, 1e-6, backend=backend))
    gate = jax.jit(lambda x, up: gated(x, up, "silu", backend=backend))
    normed, products = norm(x), gate(x, up)
    for first, count in ((0, 1), (7, 2), (64, 8), (3, 128)):
        some = slice(first, first + count)
        np.testing.assert_array_equal(norm(x[some]), normed[some])
        np.testing.assert_array_equal(gate(x[some], up[some]), products[some])


@pytest.mark.parametrize("k", [1, 3, 16, 1024, 1025, 49_157])
def test_argmax(k: int, backend: str) -> None:
    x = np.array(rows(9, k))
    x[1, [0, k // 2, k - 1]] = 9.0  # the first of equals
    x[2] = -np.inf
    x[3, k - 1] = np.inf
    x[4, k // 3] = np.nan
    x[5] = -3e38
    x[6, k - 1] = 3e38
    index, finite = jax.jit(lambda x: argmax(x, backend=backend))(x)
    sound = np.isfinite(x).all(-1)
    assert index.dtype == jnp.int32
    np.testing.assert_array_equal(finite, sound)
    np.testing.assert_array_equal(np.asarray(index)[sound], x[sound].argmax(-1))
    assert index[3] == k - 1
    assert ((index >= 0) & (index < k)).all()
    np.testing.assert_array_equal(jax.vmap(lambda row: argmax(row, backend=backend)[0])(x), index)


def exact_top_mask(score: np.ndarray, mass: np.ndarray, target: float) -> np.ndarray:
    order = np.lexsort((np.arange(score.size), -score))
    sums = np.cumsum(mass[order].astype(np.float64))
    reached = np.flatnonzero((sums >= target) & (sums > 0))
    kept = np.zeros(score.size, bool)
    kept[order[: reached[0] + 1] if reached.size else order] = True
    return kept


@pytest.mark.parametrize("k", [1, 7, 1000, 49_157])
@pytest.mark.parametrize("ties", [False, True])
def test_top_mask(k: int, ties: bool, backend: str) -> None:
    rng = np.random.default_rng(k)
    score = rng.normal(size=(10, k)).astype(np.float32) * 5
    if ties:
        score = np.round(score)  # both zeros among them
    score[1] = 2.5
    score[2, ::2] = -np.inf
    mass = rng.integers(0, 9, score.shape).astype(np.float32)  # whose sums are exact
    mass[2] *= np.isfinite(score[2])
    mass[3] = 1.0
    mass[4] = 0.0
    mass[:4, 0] = 1.0
    share = np.array([0.5, 0.3, 0.9, 0.0, 0.5, 1.0, 1.1, 1e-9, 0.99, 0.0], np.float32)
    target = np.ceil(share * mass.sum(-1)).astype(np.float32)
    target[3] = min(40, k)
    got = np.asarray(jax.jit(lambda *a: top_mask(*a, backend=backend))(score, mass, target))
    for i in range(10):
        np.testing.assert_array_equal(got[i], exact_top_mask(score[i], mass[i], target[i]), err_msg=str(i))


def test_gradients(backend: str) -> None:
    x, weights, up = rows(3, 70), rows(2, 70, seed=1), rows(3, 70, seed=2)

    def loss(x, weights, up, backend):
        y = gated(rms_norm(x, weights, 1e-5, layer=1, backend=backend), up, "gelu_tanh", backend=backend)
        return (y * jnp.cos(y)).sum()

    ours = jax.grad(loss, (0, 1, 2))(x, weights, up, backend)
    for got, want in zip(ours, jax.grad(loss, (0, 1, 2))(x, weights, up, "xla")):
        assert nmse(got, np.asarray(want, np.float64)) < 1e-10


def test_no_rows(backend: str) -> None:
    assert rms_norm(jnp.ones((0, 8)), jnp.ones(8), 1e-5, backend=backend).shape == (0, 8)
    assert gated(jnp.ones((0, 8)), jnp.ones((0, 8)), "silu", backend=backend).shape == (0, 8)
    assert argmax(jnp.ones((0, 8)), backend=backend)[0].shape == (0,)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        rms_norm(jnp.ones((2, 8)), jnp.ones(9), 1e-5)
    with pytest.raises(ValueError, match="do not fit together"):
        rms_norm(jnp.ones((2, 8)), jnp.ones((2, 3, 8)), 1e-5, layer=0)
    with pytest.raises(ValueError, match="differ"):
        gated(jnp.ones(8), jnp.ones(9), "silu")
    with pytest.raises(UnsupportedError, match=r"swish.*accepted: silu"):
        gated(jnp.ones(8), jnp.ones(8), "swish")
    with pytest.raises(ValueError, match="no elements"):
        argmax(jnp.ones((2, 0)))
    with pytest.raises(ValueError, match="do not fit together"):
        top_mask(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(3))
    with pytest.raises(UnsupportedError, match=r"'gpu'.*accepted: auto, native, xla"):
        argmax(jnp.ones(2), backend="gpu")
    monkeypatch.setattr(api, "available", lambda: False)
    with pytest.raises(UnsupportedError, match="'native' is not available"):
        argmax(jnp.ones(2), backend="native")
    assert argmax(jnp.asarray([1.0, 2.0]))[0] == 1  # auto


def test_a_layer_outside_the_stack_is_clamped() -> None:
    x, weights = rows(2, 8), rows(3, 8, seed=1)
    for layer, inside in ((-1, 0), (7, 2)):
        out = rms_norm(x, weights, 1e-5, layer=layer, backend=EITHER)
        np.testing.assert_allclose(out, rms_norm(x, weights[inside], 1e-5, backend="xla"), rtol=1e-5)
