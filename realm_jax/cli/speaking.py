"""realm generate and realm chat: text from a model."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realm_jax.cli import options
from realm_jax.cli.options import given
from realm_jax.cli.output import finish_line, one_line, read_lines, read_text, write_json, write_text
from realm_jax.cli.progress import Bars, progress_bars
from realm_jax.errors import InvalidRequestError, RealmError

if TYPE_CHECKING:
    from realm_jax import LLM
    from realm_jax.results import Piece
    from realm_jax.sampling_params import SamplingParams

_COMMANDS = "/clear forgets the conversation, /exit or Ctrl-D ends it; Ctrl-C stops an answer"


def generate(
    model: options.Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help='The prompt; "-" reads the standard input.')
    ] = None,
    file: Annotated[str | None, typer.Option("--file", "-f", help="Read the prompt from this file.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt as a question, in the model's chat format.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    template: Annotated[
        str | None, typer.Option(help="With --chat: a Jinja2 file in place of the model's own.")
    ] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    stop: options.Stop = None,
    stop_token_id: options.StopTokenId = None,
    ignore_eos: options.IgnoreEos = None,
    n: Annotated[int | None, typer.Option("--n", help="Answers to the prompt (with --json).")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Report this many likely tokens per position (with --json).")
    ] = None,
    json_schema: options.JsonSchema = None,
    grammar: options.Grammar = None,
    adapter: options.Adapter = None,
    adapter_scale: options.AdapterScale = None,
    draft: options.Draft = None,
    speculate: options.Speculate = None,
    mesh: options.Mesh = None,
    context_length: options.ContextLength = None,
    backend: options.Backend = None,
    json: options.Json = False,
) -> None:
    """Continue a prompt, printing the text as it comes."""
    params = _sampling_params(locals())
    names, asked = _adapter(adapter, adapter_scale, speculate)
    if not json and (params.n > 1 or params.logprobs is not None):
        raise InvalidRequestError("--n above 1 and --logprobs are reported with --json only")
    if not chat and (system is not None or template is not None):
        raise InvalidRequestError("--system and --template need --chat")
    text = _prompt(prompt, file)
    source = _template(template) if chat else None
    loading = {"context_length": context_length, "backend": backend, "draft": draft, "mesh": mesh, "adapters": names}
    with progress_bars() as bars, _loaded(model, bars, **loading) as llm:
        if chat:
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": text})
            if json:
                write_json(llm.chat(messages, params, template=source, **asked))
            else:
                _write_stream(llm.chat(messages, params, stream=True, template=source, **asked), bars)
        elif json:
            write_json(llm.generate(text, params, **asked))
        else:
            _write_stream(llm.stream(text, params, **asked), bars)


def chat(
    model: options.Model = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    template: Annotated[str | None, typer.Option(help="A Jinja2 chat template in place of the model's own.")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    stop: options.Stop = None,
    json_schema: options.JsonSchema = None,
    grammar: options.Grammar = None,
    adapter: options.Adapter = None,
    adapter_scale: options.AdapterScale = None,
    draft: options.Draft = None,
    speculate: options.Speculate = None,
    mesh: options.Mesh = None,
    context_length: options.ContextLength = None,
    backend: options.Backend = None,
) -> None:
    """Talk with a model: a line is a turn; /clear forgets the conversation, /exit or Ctrl-D ends it."""
    params = _sampling_params(locals())
    names, asked = _adapter(adapter, adapter_scale, speculate)
    opening = [{"role": "system", "content": system}] if system is not None else []
    source = _template(template)
    loading = {"context_length": context_length, "backend": backend, "draft": draft, "mesh": mesh, "adapters": names}
    with progress_bars() as bars, _loaded(model, bars, **loading) as llm:
        messages = list(opening)
        if sys.stdin.isatty():
            print(_COMMANDS, file=sys.stderr)
        for line in _lines():
            if line == "/exit":
                break
            if line == "/clear":
                messages = list(opening)
                continue
            if sys.stdin.isatty() and re.fullmatch("/[a-z]*", line):
                print(_COMMANDS, file=sys.stderr)
                continue
            messages.append({"role": "user", "content": line})
            try:
                answer = _write_stream(llm.chat(messages, params, stream=True, template=source, **asked), bars)
            except KeyboardInterrupt:  # ends this answer, not the conversation; the unfinished turn is forgotten
                messages.pop()
                write_text("\n")
            except RealmError as error:
                if not sys.stdin.isatty():
                    raise
                messages.pop()
                finish_line()
                print(f"error: {one_line(str(error))}", file=sys.stderr)
            else:
                messages.append({"role": "assistant", "content": answer})


def _sampling_params(arguments: dict[str, Any]) -> "SamplingParams":
    """The sampling options among a command's arguments; those left out keep SamplingParams' defaults."""
    from realm_jax.sampling_params import SamplingParams

    for name in ("json_schema", "grammar"):
        if arguments.get(name) is not None:
            arguments[name] = _given_text(name, arguments[name])
    renamed = {"stop_token_ids": "stop_token_id"}  # given one at a time on the command line
    names = (field.name for field in dataclasses.fields(SamplingParams))
    return SamplingParams(**given(**{name: arguments.get(renamed.get(name, name)) for name in names}))


def _given_text(name: str, value: str) -> Any:
    """A grammar's file, or a schema: its text, or true, or a file."""
    if name == "json_schema":
        if value.strip() == "true":
            return True
        if value.lstrip().startswith("{"):
            return value
    return read_text(value)


def _adapter(
    adapter: str | None, scale: float | None, speculate: int | None
) -> tuple[dict[str, str] | None, dict[str, Any]]:
    """The adapter to load by name, and what each request asks for."""
    if adapter is None:
        if scale is not None:
            raise InvalidRequestError("--adapter-scale needs --adapter")
        return None, given(speculate=speculate)
    name, equals, path = adapter.partition("=")
    if not equals:
        name, path = "adapter", adapter
    if not name or not path:
        raise InvalidRequestError(f"--adapter is {adapter!r}; accepted: NAME=PATH, or PATH")
    return {name: path}, given(adapter=name, adapter_scale=scale, speculate=speculate)


@contextmanager
def _loaded(model: str | None, bars: Bars | None, **engine: Any) -> "Iterator[LLM]":
    """The loaded model, fetched first where needed."""
    from realm_jax import registry

    path = registry.resolve(model, bars)
    if bars is not None:
        bars("starting", 0, 0)
    from realm_jax import LLM

    with LLM(path, progress=bars, **given(**engine)) as llm:
        if bars is not None:
            bars.hide()
        yield llm


def _template(file: str | None) -> str | None:
    return None if file is None else read_text(file)


def _prompt(prompt: str | None, file: str | None) -> str:
    if (prompt is None) == (file is None):
        both = prompt is not None
        raise InvalidRequestError(
            "-p and --file are both given; accepted: one of them"
            if both
            else "a prompt is needed: -p TEXT, -p - or --file FILE"
        )
    if file is not None:
        return read_text(file)
    return read_text("-") if prompt == "-" else str(prompt)


def _write_stream(pieces: "Iterator[Piece]", bars: Bars | None) -> str:
    """Print pieces as they come and a line break after the last; returns the whole text."""
    text = ""
    speculation = None
    with closing(pieces):  # type: ignore[type-var]  # an iterator of LLM's is a generator; closing it ends the request
        for piece in pieces:
            if bars is not None:
                bars.hide()
            text += piece.text
            write_text(piece.text)
            speculation = piece.speculation
    write_text("\n")
    if speculation is not None and sys.stderr.isatty():
        s = speculation
        print(f"speculation: {s.accepted} of {s.drafted} drafts accepted in {s.rounds} rounds", file=sys.stderr)
    return text


def _lines() -> Iterator[str]:
    """The user's turns: from a terminal with a prompt and line editing, else the lines of the standard input."""
    if not sys.stdin.isatty():
        yield from (line for line in read_lines() if line.strip())
        return
    import readline  # noqa: F401  (line editing for input())

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line
