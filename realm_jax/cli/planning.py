"""realm plan: what a model takes and gives on devices that are not here. Imports jax for --compile alone."""

import dataclasses
from typing import Annotated

import typer

from realm_jax.cli.options import Json
from realm_jax.cli.output import write_json
from realm_jax.interrupt import interrupt_deferred


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file, a checkpoint, a name of `realm models list` that is downloaded, a JSON file of "
            "metadata, or a shape such as llama-70b:Q4_K.",
        ),
    ],
    topology: Annotated[str, typer.Option(help="Devices: h100:8, v5e:4x4, cpu:2 and the like.")],
    mesh: Annotated[str | None, typer.Option(help="How to use them, such as tensor=4,data=2; left out: auto.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens that a request may hold.")] = None,
    batch: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the decode step for TPUs (needs libtpu), or lower it for others.")
    ] = False,
    json: Json = False,
) -> None:
    """Memory per device, what fits, collectives and limits of a model on a topology; reads no weights."""
    from realm_jax import planning
    from realm_jax.planning.plan import DEFAULT_BATCH

    devices = planning.Topology.parse(topology)
    outline = planning.read_outline(model, context)
    planned = planning.plan(outline, devices, mesh, batch=DEFAULT_BATCH if batch is None else batch)
    if compile:
        with interrupt_deferred():  # as when LLM is imported
            from realm_jax.planning.compiling import compile_plan

        planned = dataclasses.replace(planned, compiled=compile_plan(planned, outline, devices))
    if json:
        write_json(planned)
    else:
        print(planning.render(planned))
