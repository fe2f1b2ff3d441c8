"""The types gguf-py cannot dequantize, against bytes that ggml's C made; and, with llama-cpp-python, every type."""

from pathlib import Path

import ggml_library
import numpy as np
import pytest

from pallas_kernels.quant_matmul import FORMATS, dequantize
from realm_jax.quant import pack
from realm_jax.quant.blocks import BLOCKS

GOLDEN = np.load(Path(__file__).parent / "golden" / "quant_blocks.npz")


def ours(name: str, blocks: np.ndarray) -> np.ndarray:
    arrays = pack(blocks.reshape(-1), (len(blocks), FORMATS[name].block), name)
    return dequantize(arrays, FORMATS[name])


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    keep = ~np.isnan(want)
    np.testing.assert_array_equal(got[keep].view(np.uint32), want[keep].view(np.uint32))


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0", "Q8_K"])
def test_golden_blocks(name):
    assert_same_bits(ours(name, GOLDEN[f"{name}_blocks"]), GOLDEN[f"{name}_values"])


def test_golden_blocks_of_q8_1_give_back_what_was_quantized():
    blocks, values = GOLDEN["Q8_1_blocks"], GOLDEN["Q8_1_values"]
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(ours("Q8_1", blocks) - values) <= step * 0.57)  # half a step, and the scale's own rounding


@pytest.mark.oracle
@pytest.mark.parametrize("name", sorted(n for n, f in FORMATS.items() if not f.dense and n != "Q8_1"))
def test_every_type_has_the_bits_of_ggml(name):
    size = BLOCKS[name][0]
    blocks = np.random.default_rng(11).integers(0, 256, (500, size), dtype=np.uint8)
    assert_same_bits(ours(name, blocks), ggml_library.dequantize(name, blocks))


@pytest.mark.oracle
def test_q8_1_of_fresh_values():
    values = np.random.default_rng(12).normal(size=(100, 32)).astype(np.float32)
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(ours("Q8_1", ggml_library.quantize("Q8_1", values)) - values) <= step * 0.57)
