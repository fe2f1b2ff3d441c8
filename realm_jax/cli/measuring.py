"""realm perplexity and realm bench: figures about a model."""

from typing import Annotated

import typer

from realm_jax.cli import options
from realm_jax.cli.options import given
from realm_jax.cli.output import read_text, size, write_json, write_table
from realm_jax.cli.progress import progress_bars
from realm_jax.interrupt import interrupt_deferred


def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, as for `realm generate`.")],
    textfile: Annotated[str, typer.Argument(metavar="TEXTFILE", help='A UTF-8 text; "-" reads the standard input.')],
    context_length: Annotated[int | None, typer.Option(help="Tokens per chunk.")] = None,
    backend: options.Backend = None,
    json: options.Json = False,
) -> None:
    """How well a model predicts a text: in chunks, the second half of each scored, as llama.cpp defines it."""
    text = read_text(textfile)
    from realm_jax import LLM, registry

    with progress_bars() as progress:
        path = registry.resolve(model, progress)
        with LLM(path, progress=progress, **given(backend=backend)) as llm:  # compiles, with a bar, until the end
            value = llm.perplexity(text, **given(context_length=context_length))
    if json:
        write_json({"perplexity": value})
    else:
        print(f"{value:.4f}")


def bench(model: options.Model = None, mesh: options.Mesh = None, json: options.Json = False) -> None:
    """Tokens per second of prefill (128 and 256 tokens) and of decoding 1, 2, 4 and 8 requests together."""
    from realm_jax import registry

    with interrupt_deferred():  # as when LLM is imported
        from realm_jax.bench import bench as measure

    with progress_bars() as progress:
        figures = measure(registry.resolve(model, progress), progress, mesh)
    if json:
        write_json(figures)
        return
    rows = [
        ["load", f"{figures['load_seconds']:.2f} s"],
        ["weights", f"{size(figures['resident_bytes'])} resident, {size(figures['file_bytes'])} in the file"],
    ]
    rows += [
        [key, f"{value:.1f} tokens/s"] for key, value in figures.items() if key.startswith(("prefill_", "decode_"))
    ]
    write_table(rows)
