"""The native CPU kernels of quant_matmul: on every instruction set that this machine has, when they were built."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quant_matmul import QUANTIZED, nmse, rows, weights

from pallas_kernels import native as library
from pallas_kernels.quant_matmul import FORMATS, UnsupportedError, Weight, dequantize, native, quant_matmuls
from realm_jax.quant import QuantizedTensor

pytestmark = pytest.mark.skipif(not library.available(), reason=library.why_not())
WIDEST = library.library().realm_native_isa() if library.available() else 0
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 20)


@pytest.fixture(params=library.ISAS[: WIDEST + 1])
def isa(request, monkeypatch):
    monkeypatch.setattr(native, "isa", lambda: library.ISAS.index(request.param))
    return request.param


def tiled(name: str, shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, QuantizedTensor]:
    """A random weight [..., N, K], dequantized by the reference, and its tiles."""
    row_major = {key: np.asarray(a) for key, a in weights(name, shape, seed).items()}
    flat = {key: a.reshape(-1, *shape[-2:-1], a.shape[-1]) for key, a in row_major.items()}
    parts = [
        native.tile({k: a[i] for k, a in flat.items()}, FORMATS[name])["tiles"] for i in range(len(flat["scales"]))
    ]
    arrays = {"tiles": jnp.asarray(np.stack(parts).reshape(*shape[:-2], *parts[0].shape))}
    return np.asarray(dequantize(row_major, FORMATS[name])), QuantizedTensor(arrays, name, shape[-2])


def bits(a) -> np.ndarray:
    return np.asarray(a).view(np.uint32)


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_format(name, isa):
    want, weight = tiled(name, (40, 512))  # the last tile holds eight rows
    assert weight.shape == (40, 512)
    np.testing.assert_array_equal(bits(weight.take_rows(jnp.arange(40))), bits(want))
    x = rows(max(COUNTS), 512)
    exact = np.asarray(x, np.float64) @ want.T.astype(np.float64)
    all_rows = np.asarray(weight.matmul(x))
    assert nmse(all_rows, exact) < 5e-5
    for m in COUNTS:
        np.testing.assert_array_equal(bits(weight.matmul(x[:m])), bits(all_rows[:m]), err_msg=f"{m} rows")
    np.testing.assert_array_equal(bits(weight.matmul(x[7])), bits(all_rows[7]))


def test_every_type_has_a_kernel():
    assert sorted(native._numbers()) == QUANTIZED


@pytest.mark.parametrize(("n", "k"), [(1, 32), (15, 64), (16, 96), (17, 1056), (130, 576), (33, 4096)])
def test_odd_shapes_and_stacks(n, k, isa):
    want, weight = tiled("Q4_1", (3, n, k))
    x = rows(5, k)
    got = jax.jit(lambda x, layer: weight.matmul(x, layer))(x, 2)
    assert nmse(got, np.asarray(x, np.float64) @ want[2].T) < 5e-5


def test_other_layers_and_rows_do_not_leak(isa):
    want, weight = tiled("Q8_0", (2, 24, 64))
    tiles = np.array(weight.arrays["tiles"])
    tiles[0] = 0xFF  # scales that are NaN
    weight = weight.replace(arrays={"tiles": jnp.asarray(tiles)})
    x = rows(9, 64)
    x = x.at[3, 5].set(jnp.nan).at[4, 40].set(jnp.inf)
    got = np.asarray(weight.matmul(x, 1))
    assert np.isnan(got[3:5]).all()
    good = [0, 1, 2, 5, 6, 7, 8]
    assert nmse(got[good], np.asarray(x)[good].astype(np.float64) @ want[1].T) < 5e-5


def test_extreme_activations(isa):
    want, weight = tiled("Q8_0", (24, 64))
    x = np.zeros((5, 64), np.float32)
    x[1] = 1e-40  # below what an int8 scale can carry: zero
    x[2] = 1e30
    x[3, :32] = np.float32(2e-30)
    x[4] = -np.linspace(-1, 1, 64)
    got = np.asarray(weight.matmul(jnp.asarray(x)))
    assert (got[:2] == 0).all()
    for i in (2, 3, 4):
        assert nmse(got[i], x[i].astype(np.float64) @ want.T) < 1e-3


def test_several_weights_share_x(isa):
    x = rows(6, 256)
    each = [
        tiled(name, (2, n, 256), seed=i)[1] for i, (name, n) in enumerate([("Q4_K", 40), ("Q6_K", 16), ("Q8_0", 7)])
    ]
    got = quant_matmuls(x, [w.weight for w in each], layers=[1, 0, 1])
    for w, layer, y in zip(each, [1, 0, 1], got):
        np.testing.assert_array_equal(bits(y), bits(w.matmul(x, layer)))


@pytest.mark.parametrize("rows_in_all", [1, 3, 40])
def test_experts(rows_in_all, isa):
    want, weight = tiled("Q4_0", (2, 5, 24, 64))
    x = rows(rows_in_all, 64)
    ids = np.random.default_rng(0).integers(0, 5, rows_in_all).astype(np.int32)
    got = jax.jit(lambda x, ids, layer: weight.expert_matmul(x, ids, layer))(x, ids, 1)
    assert nmse(got, np.einsum("mk,mnk->mn", np.asarray(x, np.float64), want[1][ids])) < 5e-5
    for i in range(rows_in_all):
        one = weight.replace(arrays={"tiles": weight.arrays["tiles"][1, ids[i]]})
        np.testing.assert_array_equal(bits(got[i]), bits(one.matmul(x[i])))


def test_vmap_and_scan_are_one_call():
    _, weight = tiled("Q4_K", (2, 40, 256))
    x = rows(12, 256).reshape(4, 3, 256)
    got = jax.jit(jax.vmap(lambda x: weight.matmul(x, 1)))(x)
    np.testing.assert_array_equal(bits(got.reshape(12, 40)), bits(weight.matmul(x.reshape(12, 256), 1)))
    text = str(jax.make_jaxpr(jax.vmap(lambda x: weight.matmul(x, 1)))(x))
    assert text.count("ffi_call[") == 1
    assert "f32[12,256]" in text
    ids = jnp.arange(8).reshape(4, 2)
    one = weight.replace(arrays={"tiles": weight.arrays["tiles"][0]})
    np.testing.assert_array_equal(
        bits(jax.vmap(one.take_rows)(ids).reshape(8, 256)), bits(one.take_rows(jnp.arange(8)))
    )


def test_gradients_are_those_of_the_weight():
    want, weight = tiled("Q5_K", (3, 600, 256))  # more rows than are dequantized at once
    x, c = rows(4, 256), rows(4, 600, seed=3)
    got = jax.grad(lambda x: (weight.matmul(x, 2) * c).sum())(x)
    assert nmse(got, np.asarray(c, np.float64) @ want[2]) < 1e-12
    want, experts = tiled("Q8_0", (3, 24, 64))
    x, c, ids = rows(4, 64), rows(4, 24, seed=3), jnp.array([2, 0, 2, 1])
    got = jax.grad(lambda x: (experts.expert_matmul(x, ids) * c).sum())(x)
    assert nmse(got, np.einsum("mn,mnk->mk", np.asarray(c, np.float64), want[np.asarray(ids)])) < 1e-12


def test_what_is_refused():
    arrays = weights("Q8_0", (24, 64))
    _, weight = tiled("Q8_0", (24, 64))
    with pytest.raises(UnsupportedError, match="it reads weights as tiles, and these are rows"):
        quant_matmuls(rows(2, 64), [Weight(arrays, FORMATS["Q8_0"])], backend="native")
    with pytest.raises(UnsupportedError, match="it reads weights as rows, and these are tiles"):
        quant_matmuls(rows(2, 64), [weight.weight], backend="xla")
    with pytest.raises(ValueError, match="x has 32 columns, the weight 64"):
        weight.matmul(rows(2, 32))
    with pytest.raises(ValueError, match="not a multiple of the block"):
        native.tile_spec((16, 100), FORMATS["Q4_K"])
    with pytest.raises(ValueError, match="expected contiguous"):
        native.tile({k: np.asarray(a) for k, a in arrays.items()}, FORMATS["Q8_0"], np.empty((1, 3), np.uint8))


ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import sys, jax, jax.numpy as jnp
sys.path.insert(0, "tests")
from test_quant_native import tiled, rows
from concurrent.futures import ThreadPoolExecutor
_, weight = tiled("Q4_K", (2048, 2048))
devices = jax.devices()
assert len(devices) == 8
def work(d):
    x, w = jax.device_put((rows(4, 2048), weight), d)
    f = jax.jit(lambda x, w: w.matmul(x))
    for _ in range(20):
        y = f(x, w)
    return float(y.sum())
with ThreadPoolExecutor(8) as pool:
    sums = set(pool.map(work, devices))
assert len(sums) == 1
"""


def test_eight_devices_on_one_core_do_not_wait_for_each_other():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", ONE_CORE], env=env, check=True, timeout=120)


def test_the_narrower_instruction_sets_are_chosen_by_name():
    code = "from pallas_kernels import native; print(native.ISAS[native.isa()])"
    for wanted in library.ISAS[: WIDEST + 1]:
        env = {**os.environ, "REALM_NATIVE_ISA": wanted}
        out = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
        assert out.stdout.strip() == wanted
    env = {**os.environ, "REALM_NATIVE_ISA": "sse9"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "REALM_NATIVE_ISA is 'sse9'; accepted on this machine: plain" in out.stderr
