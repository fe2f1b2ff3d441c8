"""Reading an adapter, in whichever form it comes."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from realm_jax.checkpoint.manifest import is_checkpoint
from realm_jax.errors import AdapterError
from realm_jax.gguf.file import display_path
from realm_jax.lora.adapter import Adapter, Place
from realm_jax.lora.checkpoint_format import read_checkpoint
from realm_jax.lora.gguf_format import read_gguf
from realm_jax.lora.peft_format import read_peft
from realm_jax.model.config import ModelConfig


def read_adapter(path: str | os.PathLike[str], config: ModelConfig, shapes: Mapping[Place, tuple[int, ...]]) -> Adapter:
    """Reads a GGUF file, a PEFT folder or a checkpoint of an adapter, as untrusted input.

    Args:
        path: of the file or the folder.
        config: of the base model.
        shapes: of the base model's matrices, as weight_shapes gives them.

    Raises:
        AdapterError: there is no such file or folder, it is damaged or not supported, or it was made for another
            model. Nothing larger than a matrix of the file is allocated before that is known.
    """
    path = Path(os.fsdecode(path))
    try:
        folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise AdapterError(f"adapter {display_path(path)}: {error}") from error
    if folder and is_checkpoint(path):
        return replace(read_checkpoint(path, config.architecture, shapes), source=str(path.absolute()))
    if folder:
        return replace(read_peft(path, config, shapes), source=str(path.absolute()))
    if not exists:
        raise AdapterError(
            f"adapter {display_path(path)}: there is no such file or folder; a GGUF file or a folder that PEFT has "
            "saved is accepted"
        )
    return replace(read_gguf(path, config.architecture, shapes), source=str(path.absolute()))
