"""Functions spelled out so that their bits do not depend on the shape: their accuracy, and the promise itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import numerics

GRID = np.concatenate([np.linspace(-86, 87, 200_001), [0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0]]).astype(np.float32)


def test_exp_is_accurate() -> None:
    ours, exact = np.asarray(jax.jit(numerics.exp)(GRID)), np.exp(GRID.astype(np.float64))
    assert np.max(np.abs(ours / exact - 1)) < 1.2e-7


def test_exp_of_very_negative_arguments_is_tiny_and_of_nan_is_nan() -> None:
    out = np.asarray(jax.jit(numerics.exp)(np.array([-1e30, -np.inf, np.nan], np.float32)))
    assert (out[:2] < 2e-38).all()
    assert np.isnan(out[2])


def test_log_is_accurate() -> None:
    x = np.concatenate([np.logspace(-37, 38, 200_001), np.linspace(0.5, 2, 100_001)]).astype(np.float32)
    exact = np.log(x.astype(np.float64))
    error = np.abs(np.asarray(jax.jit(numerics.log)(x)) - exact)
    assert np.max(error / np.maximum(np.abs(exact), 1e-7)) < 2e-7


@pytest.mark.parametrize(
    ("ours", "exact"),
    [(numerics.sigmoid, lambda x: 1 / (1 + np.exp(-x))), (numerics.tanh, np.tanh)],
    ids=["sigmoid", "tanh"],
)
def test_squashing_functions_are_accurate(ours: Callable, exact: Callable) -> None:
    assert np.max(np.abs(np.asarray(jax.jit(ours)(GRID)) - exact(GRID.astype(np.float64)))) < 2e-7


@pytest.mark.parametrize("width", [1, 2, 3, 64, 127, 576])
def test_sum_and_softmax(width: int) -> None:
    x = np.random.default_rng(width).standard_normal((5, width)).astype(np.float32)
    np.testing.assert_allclose(numerics.row_sum(jnp.asarray(x))[:, 0], x.astype(np.float64).sum(-1), atol=1e-5)
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    np.testing.assert_allclose(numerics.softmax(jnp.asarray(x)), e / e.sum(-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "centred_exp", "rms", "log_of_sum", "sigmoid_of_centred"])
def test_bits_do_not_depend_on_the_batch(name: str) -> None:
    functions = {
        "softmax": numerics.softmax,
        "centred_exp": lambda x: numerics.exp(x - x.max(-1, keepdims=True)),
        "rms": lambda x: x / jnp.sqrt(numerics.row_sum(x * x) + 1e-5),
        "log_of_sum": lambda x: x - numerics.log(numerics.row_sum(numerics.exp(x))),
        "sigmoid_of_centred": lambda x: numerics.sigmoid(x - x.max(-1, keepdims=True)),
    }
    run = jax.jit(jax.vmap(functions[name]))
    for width in (64, 128, 576, 2048):
        x = np.random.default_rng(width).standard_normal((8, 16, width)).astype(np.float32)
        for rows in (1, 16):
            whole = np.asarray(run(x[:, :rows]))
            for batch in (1, 2, 3, 4):
                np.testing.assert_array_equal(np.asarray(run(x[:batch, :rows])), whole[:batch])
