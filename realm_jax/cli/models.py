"""realm models: the models that are here and those that can be fetched by name."""

from typing import Annotated

import typer

from realm_jax import registry
from realm_jax.cli.options import Json
from realm_jax.cli.output import printable, size, write_json, write_table
from realm_jax.cli.progress import progress_bars

app = typer.Typer(help="List, fetch and remove models.", rich_markup_mode=None, invoke_without_command=True)

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A name of `realm models list`, or owner/name[:QUANT] on the Hugging Face hub."
    ),
]


@app.callback()
def _top(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("list")
def list_models(json: Json = False) -> None:
    """The named models and everything in the cache."""
    models = registry.listing()
    if json:
        rows = [
            {
                "name": model.name,
                "about": model.about,
                "license": model.license,
                "size": model.size,
                "source": model.source,
                "path": str(model.path) if model.path else None,
                "default": model.name == registry.default_name(),
            }
            for model in models
        ]
        write_json({"models": rows})
        return
    table = [["NAME", "SIZE", "HERE", "LICENSE", "SOURCE"]]
    for model in models:
        name = model.name + (" (default)" if model.name == registry.default_name() else "")
        here = "yes" if model.path else "no"
        table.append([printable(name), size(model.size), here, model.license or "?", printable(model.source)])
    write_table(table)


@app.command("pull")
def pull(name: Name) -> None:
    """Fetch a model, or go on with an interrupted download; prints its path."""
    with progress_bars() as progress:
        path = registry.resolve(name, progress)
    print(path)


@app.command("path")
def path(name: Name) -> None:
    """Print the path of a model that is here."""
    print(registry.find(name))


@app.command("remove")
def remove(name: Name) -> None:
    """Delete a model from the cache."""
    print(f"removed {printable(name)}: {size(registry.remove(name))} freed")
