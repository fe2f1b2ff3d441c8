"""Models made of another one's layers, to speculate with: some left out, some added that change nothing."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

# What a layer adds to its input is the output of these two.
_OUTPUTS = ("attn_output", "ffn_down")

Layer = tuple[int, bool]  # of the original, and whether it is silent: reads and multiplies all, and adds nothing


def layer_count(path: Path) -> int:
    """Layers of a model's file."""
    reader = gguf.GGUFReader(str(path))
    return int(_field(reader, "block_count").contents())


def write_layers(source: Path, path: Path, layers: Sequence[Layer]) -> None:
    """Writes the model in `source` with these layers in place of its own; under another name until it is whole.

    The matrices stay as they are packed. Silent layers have zeros for their output projections.
    """
    reader = gguf.GGUFReader(str(source))
    partial = path.with_name(path.name + ".part")
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(str(partial), architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        count = field.name == f"{architecture}.block_count"
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, len(layers) if count else field.contents(), field.types[0], inner)
    original = {tensor.name: tensor for tensor in reader.tensors}
    chosen = [(name, name, False) for name in original if not name.startswith("blk.")]
    for i, (layer, silent) in enumerate(layers):
        for name in original:
            if name.startswith(prefix := f"blk.{layer}."):
                role = name.removeprefix(prefix)
                chosen.append((name, f"blk.{i}.{role}", silent and role.removesuffix(".weight") in _OUTPUTS))
    for old, new, _ in chosen:
        t = original[old]
        writer.add_tensor_info(new, t.data.shape, t.data.dtype, t.data.nbytes, t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for old, _, silent in chosen:
        data = original[old].data
        writer.write_tensor_data(np.zeros_like(data) if silent else data)  # zero bytes are zero in every ggml type
    writer.close()
    partial.replace(path)


def deepened(layers: int, depth: int) -> list[Layer]:
    """All layers of a model of so many, then silent ones up to a depth."""
    return [(i, False) for i in range(layers)] + [(i % layers, True) for i in range(depth - layers)]


def without(layers: int, dropped: Sequence[int]) -> list[Layer]:
    """All layers of a model of so many but the dropped ones."""
    return [(i, False) for i in range(layers) if i not in dropped]


def _field(reader: gguf.GGUFReader, name: str) -> gguf.ReaderField:
    architecture = str(reader.fields["general.architecture"].contents())
    return reader.fields[f"{architecture}.{name}"]
