"""Adapters in GGUF files, as llama.cpp's convert_lora_to_gguf.py writes them."""

import math
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np

from realm_jax.errors import AdapterError, GGUFError
from realm_jax.gguf import GGMLType, GGUFFile, open_gguf
from realm_jax.gguf.file import display_path
from realm_jax.gguf.header import TensorInfo, quote
from realm_jax.lora.adapter import Adapter, Builder, Place, name_of

_TYPES = {
    GGMLType.F32: np.dtype(np.float32),
    GGMLType.F16: np.dtype(np.float16),
    GGMLType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_NAME = re.compile(r"(?:blk\.([0-9]{1,5})\.)?([a-z0-9_]+\.weight)\.lora_([ab])")


def read_gguf(path: str | os.PathLike[str], architecture: str, shapes: Mapping[Place, tuple[int, ...]]) -> Adapter:
    """The adapter in a GGUF file. AdapterError for whatever is wrong with it."""
    try:
        with open_gguf(path) as file:
            return _read(file, architecture, shapes)
    except GGUFError as error:
        raise AdapterError(f"adapter {error}") from error


def _read(file: GGUFFile, architecture: str, shapes: Mapping[Place, tuple[int, ...]]) -> Adapter:
    builder = Builder(display_path(file.path), architecture, shapes)
    for key, wanted in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", architecture),
    ):
        found = file.metadata.get(key)
        if found != wanted:
            says = quote(found) if isinstance(found, str) else "missing" if found is None else "no text"
            raise builder.fail(f"metadata key {key} is {says}; {wanted!r} is accepted")
    if any(key.startswith("adapter.alora.") for key in file.metadata):
        raise builder.fail("it is an activated LoRA, which applies to a part of a sequence; plain ones are accepted")
    alpha = file.metadata.get("adapter.lora.alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or not alpha:
        says = "missing" if alpha is None else f"{alpha}" if isinstance(alpha, (int, float)) else "no number"
        raise builder.fail(f"metadata key adapter.lora.alpha is {says}; a finite number other than 0 is accepted")

    halves: dict[Place, dict[str, TensorInfo]] = {}
    for name, info in file.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise builder.fail(
                f"tensor {quote(name)} is no part of a LoRA adapter; names that end in .weight.lora_a and "
                ".weight.lora_b are accepted"
            )
        layer, role, half = match.groups()
        place = (role, None if layer is None else int(layer))
        builder.check_place(place, f"tensor {quote(name)}")
        if info.type not in _TYPES and info.type != GGMLType.Q8_0:
            accepted = ", ".join(t.name for t in (*_TYPES, GGMLType.Q8_0))
            raise builder.fail(f"tensor {quote(name)} is of type {info.type.name}; accepted: {accepted}")
        if half in halves.setdefault(place, {}):
            raise builder.fail(f"{name_of(place)}: there are two matrices {half.upper()}")
        halves[place][half] = info
    for place, pair in halves.items():
        for half in "ab":
            if half not in pair:
                raise builder.fail(f"{name_of(place)}: there is no .lora_{half}; both are needed")
        # Written by rows of A: the embedding's are transposed there, as they are here.
        rank = builder.check_pair(place, pair["a"].shape, pair["b"].shape)
        a, b = pair["a"], pair["b"]
        builder.add(place, alpha / rank, partial(_values, file, a), partial(_values, file, b))
    return builder.build()


def _values(file: GGUFFile, info: TensorInfo) -> np.ndarray:
    data = file.data(info.name)
    if info.type == GGMLType.Q8_0:
        rows = data.reshape(*info.shape[:-1], -1)
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q8_0).astype(np.float32).reshape(info.shape)
    return np.array(data).view(_TYPES[info.type]).reshape(info.shape)


def write_gguf(adapter: Adapter, path: str | os.PathLike[str], alpha: float, *, ggml_type: str = "F16") -> None:
    """Writes an adapter as llama.cpp's converter does.

    alpha: rank times the scale, of all pairs. ggml_type: F32, F16, BF16 or Q8_0, of the matrices whose rows it suits;
    others are F16. Raises AdapterError when a pair has another scale than alpha / rank.
    """
    writer = gguf.GGUFWriter(str(Path(path)), adapter.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for place, pair in adapter.pairs.items():
        if not math.isclose(pair.scale * pair.rank, alpha, rel_tol=1e-6):
            raise AdapterError(
                f"{name_of(place)} has scale {pair.scale:g} at rank {pair.rank}; a GGUF file holds one alpha for all, "
                f"and {alpha:g} was given"
            )
        for half, matrix in (("a", pair.a), ("b", pair.b)):
            kind = gguf.GGMLQuantizationType[ggml_type]
            if matrix.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = gguf.GGMLQuantizationType.F16
            values = gguf.quants.quantize(np.ascontiguousarray(matrix, np.float32), kind)
            writer.add_tensor(f"{name_of(place)}.lora_{half}", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
