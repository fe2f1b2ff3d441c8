"""Write tests/golden/quant_blocks.npz: blocks of the types gguf-py cannot dequantize, with what ggml's C makes of them.

Needs llama-cpp-python. Q8_1 has no dequantization in ggml; for it the file holds the values that were quantized.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ggml_library  # noqa: E402

from realm_jax.gguf.types import GGMLType  # noqa: E402


def main() -> None:
    rng = np.random.default_rng(7)
    arrays = {}
    for name in ("Q1_0", "Q2_0", "Q8_K"):
        blocks = rng.integers(0, 256, (4, GGMLType[name].type_size), dtype=np.uint8)
        arrays[f"{name}_blocks"], arrays[f"{name}_values"] = blocks, ggml_library.dequantize(name, blocks)
    values = rng.normal(size=(4, 32)).astype(np.float32)
    arrays["Q8_1_blocks"], arrays["Q8_1_values"] = ggml_library.quantize("Q8_1", values), values
    np.savez_compressed(ROOT / "tests" / "golden" / "quant_blocks.npz", **arrays)


if __name__ == "__main__":
    main()
