"""Packing and dequantization of every ggml type, against gguf-py's, bit for bit."""

import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quant_matmul import FORMATS, dequantize, take_rows
from realm_jax.errors import GGUFError, UnsupportedModelError
from realm_jax.gguf.types import GGMLType
from realm_jax.quant import QuantizedTensor, pack, packed_spec
from realm_jax.quant.blocks import BLOCKS

NOT_IN_GGUF_PY = {"Q8_1", "Q8_K", "Q1_0", "Q2_0"}  # tests/test_quant_oracle.py
DENSE = {name for name, f in FORMATS.items() if f.dense}
QUANTIZED = sorted(FORMATS.keys() - DENSE)
GGUF_PY = sorted(set(QUANTIZED) - NOT_IN_GGUF_PY)

# Where a block keeps its float16 numbers; IQ1_M spreads its own over four places.
FLOAT16_AT = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64], "IQ4_NL": [0], "IQ4_XS": [0],
    "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0], "IQ1_S": [0],
}  # fmt: skip
SPECIAL = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00], "<u2")


def random_blocks(name: str, rows: int, k: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, bytes]: random bytes, so also numbers that no quantizer would write."""
    size = BLOCKS[name][0]
    return np.random.default_rng(seed).integers(0, 256, (rows, k // FORMATS[name].block * size), dtype=np.uint8)


def special_blocks(name: str) -> np.ndarray:
    """Blocks whose scales are zeros, subnormals, the largest, infinities and NaN: uint8 [rows, bytes of one block]."""
    size = BLOCKS[name][0]
    if name == "MXFP4":
        blocks = random_blocks(name, 256, FORMATS[name].block)
        blocks[:, 0] = np.arange(256)
        return blocks
    if name == "NVFP4":
        blocks = random_blocks(name, 256, FORMATS[name].block)
        blocks[:, :4] = np.arange(256)[:, None]
        return blocks
    at = FLOAT16_AT.get(name, [])
    blocks = random_blocks(name, len(SPECIAL) ** max(1, len(at)), FORMATS[name].block)
    if name == "IQ1_M":
        for i in range(4):
            nibble = (SPECIAL >> np.uint16(4 * i)) & np.uint16(15)
            blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 15) | (nibble << 4)
        return blocks
    assert at
    for i, offset in enumerate(at):
        values = SPECIAL[np.arange(len(blocks)) // len(SPECIAL) ** i % len(SPECIAL)]
        blocks[:, offset : offset + 2] = values.view(np.uint8).reshape(-1, 2)
    assert blocks.shape[1] == size
    return blocks


def oracle(name: str, blocks: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    keep = ~np.isnan(want)
    np.testing.assert_array_equal(got[keep].view(np.uint32), want[keep].view(np.uint32))


def on_device(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(a) for name, a in arrays.items()}


def test_every_ggml_type_has_a_format_and_its_block_size():
    assert set(FORMATS) == set(BLOCKS) == {t.name for t in GGMLType}
    for t in GGMLType:
        assert (FORMATS[t.name].block, BLOCKS[t.name][0]) == (t.block_size, t.type_size), t.name


@pytest.mark.parametrize("name", GGUF_PY)
def test_dequantize_has_the_bits_of_gguf_py(name):
    blocks = random_blocks(name, 24, 3 * FORMATS[name].block)
    want = oracle(name, blocks)
    arrays = pack(blocks.reshape(-1), want.shape, name)
    assert_same_bits(dequantize(arrays, FORMATS[name]), want)
    assert_same_bits(dequantize(on_device(arrays), FORMATS[name]), want)


@pytest.mark.parametrize("name", GGUF_PY)
def test_compiled_dequantize_is_within_one_ulp(name):
    blocks = random_blocks(name, 24, 3 * FORMATS[name].block, seed=1)
    want = oracle(name, blocks)
    arrays = on_device(pack(blocks.reshape(-1), want.shape, name))
    got = np.asarray(jax.jit(dequantize, static_argnums=1)(arrays, FORMATS[name]))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    with np.errstate(all="ignore"):
        near = (got == want) | (np.abs(got - want) <= np.spacing(np.abs(want))) | np.isnan(want)
    assert near.all()


@pytest.mark.parametrize("name", GGUF_PY)
def test_special_scales(name):
    blocks = special_blocks(name)
    want = oracle(name, blocks)
    arrays = pack(blocks.reshape(-1), want.shape, name)
    assert_same_bits(dequantize(arrays, FORMATS[name]), want)
    got = np.asarray(dequantize(on_device(arrays), FORMATS[name]))
    if name == "MXFP4":  # scales of 2^-128 and 2^-127 are subnormal, and XLA's CPU code takes subnormals for zero
        assert np.all((got[:2] == 0) | (got[:2] == want[:2]))
        got, want = got[2:], want[2:]
    assert_same_bits(got, want)


@pytest.mark.parametrize("name", QUANTIZED)
def test_packed_bytes(name):
    spec = packed_spec((4, 2 * FORMATS[name].block), name)
    packed = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in spec.values())
    bound = 1.6 if name[:3] in ("IQ1", "IQ2", "IQ3") else 1.25
    assert packed <= bound * 8 * BLOCKS[name][0]


@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "Q8_0", "Q5_1", "IQ1_M"])
def test_pack_in_chunks_into_a_stack(name, monkeypatch):
    monkeypatch.setattr("realm_jax.quant.packing.CHUNK_BYTES", 1000)
    k = 2 * FORMATS[name].block
    blocks = random_blocks(name, 3 * 7, k)
    spec = packed_spec((5, 3, 7, k), name)
    stack = {key: np.zeros(shape, dtype) for key, (shape, dtype) in spec.items()}
    pack(blocks.reshape(-1), (3, 7, k), name, out={key: a[2] for key, a in stack.items()})
    got = dequantize({key: a[2] for key, a in stack.items()}, FORMATS[name])
    assert_same_bits(got.reshape(21, k), oracle(name, blocks))
    assert not any(a[1].any() or a[3].any() for a in stack.values())


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q6_K", "TQ1_0", "NVFP4", "IQ2_XXS", "IQ1_M"])
def test_pack_needs_little_memory(name):
    k = 4 * FORMATS[name].block
    blocks = np.zeros(16 << 20, np.uint8)[: (16 << 20) // (4 * BLOCKS[name][0]) * 4 * BLOCKS[name][0]]
    rows = blocks.size // (4 * BLOCKS[name][0])
    out = {key: np.empty(shape, dtype) for key, (shape, dtype) in packed_spec((rows, k), name).items()}
    tracemalloc.start()
    pack(blocks, (rows, k), name, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("F32", np.array([[1e-45, -0.0], [np.inf, 3.5]], np.float32)),
        ("F16", np.array([[6e-8, -1.0], [np.inf, 2.5]], np.float16)),
        ("F64", np.array([[1e300, 0.1], [-2.0, 1e-300]])),
        ("I8", np.array([[-128, 127]], np.int8)),
        ("I16", np.array([[-32768, 5]], np.int16)),
        ("I32", np.array([[-(2**24), 7]], np.int32)),
        ("I64", np.array([[-(2**24), 7]], np.int64)),
    ],
)
def test_dense_types(name, values):
    arrays = pack(values.view(np.uint8).reshape(-1), values.shape, name)
    with np.errstate(over="ignore"):
        assert_same_bits(dequantize(arrays, FORMATS[name]), values.astype(np.float32))


def test_bfloat16():
    words = np.arange(65536, dtype=np.uint16)
    arrays = pack(words.view(np.uint8), (256, 256), "BF16")
    assert_same_bits(dequantize(arrays, FORMATS["BF16"]).reshape(-1), (words.astype(np.uint32) << 16).view(np.float32))


def test_a_vector():
    blocks = random_blocks("Q8_0", 1, 96)
    arrays = pack(blocks[0], (96,), GGMLType.Q8_0)
    assert_same_bits(dequantize(arrays, FORMATS["Q8_0"]), oracle("Q8_0", blocks)[0])


def test_what_pack_refuses():
    with pytest.raises(GGUFError, match="Q4_0 tensor of shape \\(2, 32\\): 35 bytes of data, expected 36"):
        pack(np.zeros(35, np.uint8), (2, 32), "Q4_0")
    with pytest.raises(GGUFError, match="row of 48 elements is not a multiple of the block of 32"):
        pack(np.zeros(27, np.uint8), (1, 48), "Q4_0")
    with pytest.raises(UnsupportedModelError, match="Q4_2"):
        packed_spec((1, 32), "Q4_2")
    with pytest.raises(UnsupportedModelError, match="int32"):
        pack(np.array([2**40]).view(np.uint8), (1,), "I64")
    spec = packed_spec((2, 32), "Q4_0")
    out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.items()} | {"scales": np.zeros((2, 1), "f4")}
    with pytest.raises(ValueError, match=r"scales.*float32.*expected float16"):
        pack(np.zeros(36, np.uint8), (2, 32), "Q4_0", out=out)


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "IQ2_XS", "BF16"])
def test_quantized_tensor(name):
    f = FORMATS[name]
    k = 2 * max(f.block, 64)
    blocks = random_blocks(name, 10, k, seed=3)
    arrays = pack(blocks.reshape(-1), (10, k), name)
    tensor = QuantizedTensor(on_device(arrays), name)
    assert tensor.shape == (10, k)
    assert tensor.nbytes == sum(a.nbytes for a in arrays.values())
    assert jax.tree.structure(tensor) == jax.tree.structure(jax.tree.map(lambda a: a, tensor))
    whole = np.asarray(tensor.dequantize())
    assert_same_bits(tensor.take_rows(jnp.array([[3, 0], [9, 3]])), whole[np.array([[3, 0], [9, 3]])])
    assert_same_bits(take_rows(tensor.arrays, f, jnp.array([99, -5])), whole[[9, 0]])
