"""The command table, and what every command shares: exit codes and one-line errors."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer
from typer.main import get_command

from realm_jax.cli import converting, inspecting, measuring, models, planning, speaking
from realm_jax.cli.output import line_is_open, one_line
from realm_jax.errors import InvalidRequestError, RealmError

app = typer.Typer(
    name="realm",
    help="Runs language models in GGUF files, compiled by JAX.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(speaking.generate)
app.command("chat")(speaking.chat)
app.command("inspect")(inspecting.inspect)
app.command("tokenize")(inspecting.tokenize)
app.command("perplexity")(measuring.perplexity)
app.command("bench")(measuring.bench)
app.command("convert")(converting.convert)
app.command("plan")(planning.plan)
app.add_typer(models.app, name="models")

# The parser's own errors: typer carries its parser inside, and only the subclass BadParameter is public.
_UsageError: Any = typer.BadParameter.__mro__[1]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("realm-jax"))
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Prints at most one line to stderr, and never a traceback
    (REALM_DEBUG=1 raises instead)."""
    if hasattr(sys.stdout, "reconfigure"):  # not when a test has put something simpler in its place
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        _check_environment()
        # Not through the command's own main(): that prints several lines and ends the process itself.
        command = get_command(app)
        with command.make_context("realm", list(arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _write(sys.stdout, "\n" if sys.stdout.isatty() else "")  # after the ^C the terminal shows
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit; there is nobody left to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("REALM_DEBUG") == "1":
            raise
        message, code = explain(error)
        _write(sys.stdout, "\n" if line_is_open() else "")
        _write(sys.stderr, f"error: {one_line(message)}\n")
        return code


def explain(error: Exception) -> tuple[str, int]:
    """The one line to print for an error, and the exit code."""
    if isinstance(error, RealmError):
        return str(error), 2
    if isinstance(error, _UsageError):
        usage: Any = error
        hint = f" ({usage.ctx.command_path} --help shows what is)" if usage.ctx is not None else ""
        return usage.format_message().rstrip(".") + hint, 2
    if isinstance(error, MemoryError):
        return "out of memory: a smaller model, context length or batch needs less", 2
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}", 2
    return f"internal error, please report it (REALM_DEBUG=1 shows where): {type(error).__name__}: {error}", 1


def _check_environment() -> None:
    """JAX would not say which variable is wrong."""
    devices = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
    if not (devices.isascii() and devices.isdigit() and 0 < int(devices[:9]) <= 1024):
        raise InvalidRequestError(f"JAX_NUM_CPU_DEVICES is {devices!r}; accepted: an integer from 1 to 1024")


def _write(stream: TextIO, end: str) -> None:
    """Keep what was written so far, ended with `end`."""
    try:
        stream.write(end)
        stream.flush()
    except OSError:  # nobody is left to read it: the error that brought us here matters more, and so does its exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes once more at exit
