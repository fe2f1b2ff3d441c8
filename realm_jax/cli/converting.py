"""realm convert: from a GGUF file to a checkpoint."""

from typing import Annotated

import typer

from realm_jax.cli import options
from realm_jax.cli.output import printable, size, write_json
from realm_jax.cli.progress import progress_bars
from realm_jax.errors import InvalidRequestError
from realm_jax.interrupt import interrupt_deferred


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model in a GGUF file, as for `realm generate`.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The checkpoint: a new or an empty folder.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint that DIR holds.")] = False,
    json: options.Json = False,
) -> None:
    """Write a checkpoint of a model, which several processes load without each reading all of it."""
    from realm_jax import registry
    from realm_jax.checkpoint.manifest import is_checkpoint

    with progress_bars() as progress:
        path = registry.resolve(model, progress)
        if is_checkpoint(path):
            raise InvalidRequestError(f"{path} is a checkpoint already; accepted: a model in a GGUF file")
        with interrupt_deferred():  # as when LLM is imported
            from realm_jax.checkpoint.writer import compute_on_host
            from realm_jax.checkpoint.writer import convert as write

        compute_on_host()
        conversion = write(path, directory, force=force, progress=progress)
    if json:
        write_json(conversion)
    else:
        print(f"{printable(conversion.path)}: {conversion.tensors} tensors, {size(conversion.size)}")
