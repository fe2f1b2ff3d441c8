"""Options that several commands take. None means "not given": the defaults are the Python API's own."""

from typing import Annotated, Any

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, a folder with one, a checkpoint, a name of `realm models list`, or owner/name[:QUANT] on "
        "the Hugging Face hub; left out, the small default model.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ContextLength = Annotated[int | None, typer.Option(help="Tokens that prompt and answer may hold together.")]
Backend = Annotated[str | None, typer.Option(help="Kernels to use: auto, native, xla or pallas.")]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="[NAME=]PATH", help="Answer with this LoRA adapter: a GGUF file or a PEFT folder."),
]
AdapterScale = Annotated[float | None, typer.Option(help="Times the adapter's own scale.")]
Draft = Annotated[
    str | None,
    typer.Option(metavar="MODEL|ngram", help="Speculate, with a smaller model of the same vocabulary or by look-up."),
]
Speculate = Annotated[int | None, typer.Option(metavar="K", help="Guess at most K tokens at a time; 0: none.")]
Mesh = Annotated[str | None, typer.Option(help="Devices to spread over, such as tensor=4,data=2.")]
JsonSchema = Annotated[
    str | None, typer.Option(metavar="FILE|TEXT", help="The answer is JSON of this schema; true: any JSON.")
]
Grammar = Annotated[str | None, typer.Option(metavar="FILE", help="The answer follows this Lark grammar.")]

MaxTokens = Annotated[int | None, typer.Option(help="Generate at most this many tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0: always the most likely token; 1: as the model says.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
TopK = Annotated[int | None, typer.Option(help="Sample among the K most likely tokens; 0: all.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens that hold this probability.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")]
TypicalP = Annotated[float | None, typer.Option(help="Locally typical sampling; 1: off.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Divides the logits of tokens seen before; 1: off.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Subtracted once per earlier occurrence.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Subtracted if a token occurred before.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text (may be repeated).")]
StopTokenId = Annotated[list[int] | None, typer.Option(metavar="ID", help="End at this token (may be repeated).")]
IgnoreEos = Annotated[bool | None, typer.Option("--ignore-eos", help="Go on after the end-of-generation token.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None and value != []}
