"""ggml's own dequantization through ctypes, from the library that llama-cpp-python brings (for oracle tests)."""

import ctypes
from pathlib import Path

import numpy as np

from realm_jax.gguf.types import GGMLType


def load() -> ctypes.CDLL:
    """ggml's base library; ImportError when llama-cpp-python is not installed."""
    import llama_cpp

    return ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))


class _TypeTraits(ctypes.Structure):
    """The head of ggml.h's struct ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def dequantize(name: str, blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, bytes per block] -> float32 [n, elements per block]."""
    library = load()
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    traits = library.ggml_get_type_traits(int(GGMLType[name])).contents
    assert traits.type_name.decode().lower() == name.lower()
    assert traits.type_size == blocks.shape[1]
    out = np.empty((blocks.shape[0], traits.blck_size), np.float32)
    blocks = np.ascontiguousarray(blocks)
    if name == "Q8_K":  # has no entry in the table
        library.dequantize_row_q8_K(
            ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size)
        )
    else:
        traits.to_float(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def quantize(name: str, values: np.ndarray) -> np.ndarray:
    """float32 [n, elements per block] -> uint8 [n, bytes per block], by quantize_row_<name>_ref."""
    values = np.ascontiguousarray(values, np.float32)
    out = np.zeros((values.shape[0], GGMLType[name].type_size), np.uint8)
    getattr(load(), f"quantize_row_{name[0].lower() + name[1:]}_ref")(
        ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(values.size)
    )
    return out
