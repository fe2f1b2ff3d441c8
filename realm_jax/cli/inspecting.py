"""realm inspect and realm tokenize: what a file holds. Neither imports jax."""

from typing import Annotated, Any

import typer

from realm_jax.cli.options import Json
from realm_jax.cli.output import printable, read_text, size, write_json, write_table
from realm_jax.cli.progress import progress_bars

_LONGEST_VALUE = 100


def inspect(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A GGUF file, a checkpoint, or the name of a downloaded model.")
    ],
    json: Json = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Show what a model file holds; refuses whatever loading it would refuse."""
    from realm_jax import registry
    from realm_jax.checkpoint import open_model
    from realm_jax.gguf.summary import describe
    from realm_jax.model import check_model
    from realm_jax.text import load_tokenizer

    with open_model(registry.find(file)) as opened:
        check_model(opened)
        load_tokenizer(opened)
        summary = describe(opened)
    if json:
        write_json(summary)
        return
    _write_summary(summary, tensors)


def _write_summary(summary: dict[str, Any], with_tensors: bool) -> None:
    kind = "GGUF version" if summary["format"] == "gguf" else "checkpoint of format"
    split = f" in {len(summary['parts'])} parts" if len(summary["parts"]) > 1 else ""
    rows = [
        ["file", printable(summary["path"])],
        ["name", printable(summary["name"] or "(none)")],
        ["architecture", printable(summary["architecture"])],
        ["parameters", f"{summary['parameters']:,}"],
        ["size", f"{summary['size']:,} bytes ({size(summary['size'])}){split}"],
        ["format", f"{kind} {summary['version']}, {summary['tensor_count']} tensors"],
    ]
    rows += [
        [f"  {name}", f"{held['tensors']} tensor{'s' * (held['tensors'] != 1)}, {size(held['bytes'])}"]
        for name, held in summary["types"].items()
    ]
    write_table(rows)
    print()
    write_table([[printable(key), _value(value)] for key, value in summary["metadata"].items()])
    if with_tensors:
        print()
        write_table(
            [
                [printable(t["name"]), t["type"], " x ".join(map(str, t["shape"])), f"{t['bytes']:,} bytes"]
                for t in summary["tensors"]
            ]
        )


def _value(value: Any) -> str:
    """A metadata value on one line of bounded length."""
    if isinstance(value, dict):
        return f"{value['length']:,} x {value['type']}"
    text = printable(str(value))
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def tokenize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, as for `realm generate`.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help='The text; "-" reads the standard input.')],
    json: Json = False,
    special: Annotated[
        bool, typer.Option("--special/--no-special", help="Add the tokens a prompt begins or ends with.")
    ] = True,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read the names of special tokens in the text as these tokens.")
    ] = False,
) -> None:
    """Show the token ids of a text."""
    from realm_jax import registry
    from realm_jax.checkpoint import open_model
    from realm_jax.text import load_tokenizer

    with progress_bars() as progress:
        path = registry.resolve(model, progress)
    with open_model(path) as opened:
        tokenizer = load_tokenizer(opened)
    content = read_text(text) if text == "-" else text
    tokens = tokenizer.encode(content, add_special=special, parse_special=parse_special)
    if json:
        pieces = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]
        write_json({"tokens": tokens, "pieces": pieces})
    else:
        print(" ".join(map(str, tokens)))
