"""The command line: exit codes, one-line errors, JSON, pipes and interrupts."""

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from random_adapters import random_adapter

from realm_jax.cli.app import run
from realm_jax.lora import weight_shapes
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.model import load_model
from realm_jax.results import Result

REALM = [sys.executable, "-m", "realm_jax.cli"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama: its answers are noise, its vocabulary holds every byte."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    tiny_models.write_tiny_model("llama", path)
    return path


@dataclasses.dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def realm(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command line in this process."""

    def call(*arguments: str | Path) -> Done:
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    return call


Realm = Callable[..., Done]


def assert_refused(done: Done, message: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr."""
    assert (done.code, done.out) == (2, "")
    assert message.lower() in done.err.lower()
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["generate", "--bogus"], "No such option: --bogus (realm generate --help shows what is)"),
        (["generate", "-p"], "'-p' requires an argument"),
        (["generate"], "a prompt is needed: -p TEXT, -p - or --file FILE"),
        (["generate", "-p", "x", "--file", "y"], "-p and --file are both given"),
        (["generate", "-p", "x", "--temperature", "-1"], "temperature is -1.0; accepted:"),
        (["generate", "-p", "x", "--temperature", "warm"], "Invalid value for '--temperature'"),
        (["generate", "-p", "x", "--temperature", "nan"], "temperature is nan; accepted:"),
        (["generate", "-p", "x", "--top-p", "5"], "top_p is 5.0; accepted:"),
        (["generate", "-p", "x", "--top-k", "-1"], "top_k is -1; accepted:"),
        (["generate", "-p", "x", "--max-tokens", "0"], "max_tokens is 0; accepted:"),
        (["generate", "-p", "x", "--max-tokens", "1.5"], "Invalid value for '--max-tokens'"),
        (["generate", "-p", "x", "--seed", "-1"], "seed is -1; accepted:"),
        (["generate", "-p", "x", "--stop", ""], "accepted: a non-empty string"),
        (["generate", "-p", "x", "--n", "2"], "--n above 1 and --logprobs are reported with --json only"),
        (["generate", "-p", "x", "--system", "y"], "--system and --template need --chat"),
        (["generate", "--file", "/no/such/file"], "cannot read /no/such/file: No such file or directory"),
        (["generate", "--file", "/"], "cannot read /: Is a directory"),
        (["generate", "missing.gguf", "-p", "x"], "no such file: 'missing.gguf'"),
        (["generate", "-p", "x", "--adapter", "=x"], "--adapter is '=x'; accepted: NAME=PATH, or PATH"),
        (["generate", "-p", "x", "--adapter-scale", "2"], "--adapter-scale needs --adapter"),
        (["generate", "-p", "x", "--grammar", "/no/such"], "cannot read /no/such"),
        (["generate", "-p", "x", "--json-schema", "{"], "json_schema"),
        (["inspect", "missing.gguf"], "no such file: 'missing.gguf'"),
        (["inspect", "qwen3-0.8b"], "no model 'qwen3-0.8b': not a file, not a named model (did you mean qwen3-"),
        (["tokenize", "missing.gguf", "x"], "no such file: 'missing.gguf'"),
        (["perplexity", "missing.gguf", "/no/such/file"], "cannot read /no/such/file"),
        (["models", "pull"], "Missing argument 'NAME'"),
        (["models", "pull", "not/a/repo"], "'not/a/repo' is no hub name"),
        (["models", "path", "tinyllama-1.1b-chat"], "tinyllama-1.1b-chat is not downloaded; realm models pull"),
        (["models", "remove", "no-such-model"], "no model 'no-such-model'"),
    ],
)
def test_refused_before_a_model_is_loaded(
    realm: Realm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("REALM_CACHE", str(tmp_path / "cache"))
    assert_refused(realm(*arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", ""], "empty"),
        (["-p", "a\udc80b"], "surrogate"),
        (["-p", "word " * 200, "--context-length", "64"], "64"),
        (["-p", "x", "--stop-token-id", "99999999"], "stop_token_ids names token 99999999"),
        (["-p", "x", "--backend", "cuda"], "backend is 'cuda'"),
        (["-p", "x", "--backend", "pallas"], "pallas"),
        (["-p", "x", "--context-length", "0"], "context_length"),
        (["-p", "x", "--mesh", "nonsense"], "mesh is 'nonsense'; accepted: "),
        (["-p", "x", "--adapter", "/no/such"], "/no/such"),
        (["-p", "x", "--draft", "/no/such.gguf"], "/no/such.gguf"),
        (["-p", "x", "--speculate", "99"], "speculate is 99"),
        (["-p", "x", "--context-length", "99999999"], "context_length"),
    ],
)
def test_refused_by_the_model(realm: Realm, tiny: Path, arguments: list[str], message: str) -> None:
    assert_refused(realm("generate", tiny, *arguments), message)


def damaged(tiny: Path, folder: Path) -> list[tuple[str, Path]]:
    data = tiny.read_bytes()
    made = {
        "empty": b"",
        "text": b"It was a dark and stormy night\n" * 100,
        "header": data[:20],
        "truncated": data[:-1000],
        "architecture": data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamb"),
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return [(name, folder / name) for name in made]


@pytest.mark.parametrize("command", [["inspect"], ["generate", "-p", "x"], ["tokenize"]])
def test_damaged_files(realm: Realm, tiny: Path, tmp_path: Path, command: list[str]) -> None:
    for name, path in damaged(tiny, tmp_path):
        if command == ["tokenize"]:
            if name != "architecture":  # which a vocabulary does not need
                assert_refused(realm("tokenize", path, "x"), str(path))
        else:
            assert_refused(realm(command[0], path, *command[1:]), "llamb" if name == "architecture" else str(path))


def test_text_that_is_no_utf8(realm: Realm, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes("café".encode("latin-1"))
    assert_refused(realm("perplexity", tiny, tmp_path / "latin1"), "latin1 is not UTF-8 text: byte 0xe9 at offset 3")


def test_too_little_text_for_perplexity(realm: Realm, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("short")
    assert_refused(realm("perplexity", tiny, tmp_path / "short", "--context-length", "128"), "128")


def test_messages_quote_no_control_characters(realm: Realm) -> None:
    done = realm("inspect", "evil\x1b[2J\n.gguf")
    assert_refused(done, "no such file")
    assert "\x1b" not in done.err


def test_a_defect_is_one_line_too(realm: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("realm_jax.registry.listing", broken)
    done = realm("models", "list")
    assert done.code == 1
    assert done.err.startswith("error: internal error, please report it")
    assert done.err.count("\n") == 1
    monkeypatch.setenv("REALM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        realm("models", "list")


# --- what commands print


@pytest.mark.parametrize("arguments", [[], ["--help"], ["generate", "-h"], ["models"], ["models", "--help"]])
def test_help(realm: Realm, arguments: list[str]) -> None:
    done = realm(*arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: realm")


def test_inspect(realm: Realm, tiny: Path) -> None:
    shown = json.loads(realm("inspect", tiny, "--json").out)
    assert shown["architecture"] == "llama"
    assert shown["tensor_count"] == len(shown["tensors"])
    text = realm("inspect", tiny, "--tensors")
    assert text.code == 0
    assert all(tensor["name"] in text.out for tensor in shown["tensors"])


def test_tokenize(realm: Realm, tiny: Path) -> None:
    from realm_jax.text import load_tokenizer

    expected = load_tokenizer(tiny).encode("Hello, wörld")
    assert realm("tokenize", tiny, "Hello, wörld").out == " ".join(map(str, expected)) + "\n"
    shown = json.loads(realm("tokenize", tiny, "Hello, wörld", "--json").out)
    assert shown["tokens"] == expected
    assert len(shown["pieces"]) == len(expected)


def test_generate_prints_what_json_says(realm: Realm, tiny: Path) -> None:
    arguments = [
        "generate",
        tiny,
        "-p",
        "one two",
        "--max-tokens",
        "12",
        "--temperature",
        "1",
        "--seed",
        "7",
        "--ignore-eos",
    ]
    result = json.loads(realm(*arguments, "--json").out)
    assert set(result) == {field.name for field in dataclasses.fields(Result)}
    assert len(result["tokens"]) == 12
    assert result["finish_reason"] == "length"
    streamed = realm(*arguments)
    assert (streamed.code, streamed.err) == (0, "")
    assert streamed.out == result["text"] + "\n"


def test_prompt_from_a_file(realm: Realm, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("one two")
    arguments = ["--max-tokens", "3", "--json"]
    from_file = json.loads(realm("generate", tiny, "--file", tmp_path / "prompt", *arguments).out)
    assert from_file["tokens"] == json.loads(realm("generate", tiny, "-p", "one two", *arguments).out)["tokens"]


def test_several_answers_and_logprobs(realm: Realm, tiny: Path) -> None:
    arguments = [
        "--max-tokens",
        "3",
        "--n",
        "2",
        "--logprobs",
        "2",
        "--temperature",
        "1",
        "--seed",
        "1",
        "--ignore-eos",
    ]
    result = json.loads(realm("generate", tiny, "-p", "x", *arguments, "--json").out)
    assert len(result["choices"]) == 2
    assert [len(entry["top"]) for entry in result["logprobs"]] == [2, 2, 2]


def test_perplexity_is_that_of_the_library(realm: Realm, tiny: Path, tmp_path: Path) -> None:
    from realm_jax import LLM

    text = "The quick brown fox jumps over the lazy dog. " * 20
    (tmp_path / "text").write_text(text)
    with LLM(tiny) as llm:
        expected = llm.perplexity(text, context_length=64)
    shown = json.loads(realm("perplexity", tiny, tmp_path / "text", "--context-length", "64", "--json").out)
    assert shown == {"perplexity": pytest.approx(expected, rel=1e-6)}


# --- processes


def environment(**more: str) -> dict[str, str]:
    return dict(os.environ) | more


@pytest.mark.parametrize("command", ["inspect", "tokenize", "models"])
def test_no_jax_where_none_is_needed(command: str, tiny: Path) -> None:
    arguments = {"inspect": [str(tiny)], "tokenize": [str(tiny), "text"], "models": ["list"]}[command]
    script = (
        "import sys; from realm_jax.cli.app import run; code = run(sys.argv[1:]);"
        "loaded = {name.split('.')[0] for name in sys.modules} & {'jax', 'jaxlib', 'flax'};"
        "print(sorted(loaded), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, command, *arguments], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_a_pipe_gets_text_only(tiny: Path) -> None:
    command = [*REALM, "generate", str(tiny), "-p", "-", "--max-tokens", "8"]
    done = subprocess.run(command, input="one two", capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout


def test_chat_takes_a_turn_a_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "template").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    command = [*REALM, "chat", str(tiny), "--template", str(tmp_path / "template"), "--max-tokens", "4"]
    done = subprocess.run(command, input=b"one\n\n/clear\ntwo\n/exit\nthree\n", capture_output=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") >= 2


def test_chat_answers_a_program_line_by_line(tiny: Path, tmp_path: Path) -> None:
    """Through pipes that stay open: each answer comes before the next line is sent."""
    (tmp_path / "template").write_text("{{ messages[-1].content }}")
    command = [*REALM, "chat", str(tiny), "--template", str(tmp_path / "template"), "--max-tokens", "4"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for line in (b"one\n", b"two\r\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\n")
        process.stdin.write(b"caf\xe9\n")
        process.stdin.close()
        said = process.stderr.read()
        assert process.wait(60) == 2
    assert said == b"error: line 3 of standard input is not UTF-8 text: byte 0xe9 at offset 3\n"


def test_chat_without_a_template_is_refused(realm: Realm, tiny: Path) -> None:
    assert_refused(realm("generate", tiny, "-p", "x", "--chat"), "tokenizer.chat_template")


def test_a_reader_that_goes_away_is_no_error(tiny: Path) -> None:
    shell = f"'{sys.executable}' -m realm_jax.cli inspect '{tiny}' --json | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # all may fit into the pipe before the reader goes


def test_interrupt_keeps_what_was_said(smollm2_path: Path) -> None:
    command = [*REALM, "generate", str(smollm2_path), "-p", "Once upon a time", "--max-tokens", "2000", "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = os.read(process.stdout.fileno(), 1)  # streamed: it comes long before the end
        process.send_signal(signal.SIGINT)
        rest, said = process.stdout.read(), process.stderr.read()
        assert process.wait(60) == 130
    assert first + rest
    assert said == b""


def on_terminal(*arguments: str | Path, piped: bool = False, typed: bytes = b"") -> tuple[int, bytes, bytes]:
    """Exit code, what a terminal received (stderr, and stdout unless `piped`), and what the pipe received."""
    main, terminal = pty.openpty()
    os.write(main, typed)
    stdout = subprocess.PIPE if piped else terminal
    command = [*REALM, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=terminal, stdout=stdout, stderr=terminal, env=environment(TERM="xterm")
    ) as process:
        os.close(terminal)
        shown = b""
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            try:
                block = os.read(main, 4096)
            except OSError:  # the other end is closed
                break
            shown += block
        out = process.stdout.read() if process.stdout else b""
    os.close(main)
    return process.returncode, shown, out


def test_bars_on_a_terminal_are_gone_at_the_end(tiny: Path) -> None:
    code, shown, out = on_terminal("generate", tiny, "-p", "one", "--max-tokens", "3", piped=True)
    assert code == 0
    assert b"loading weights" in shown
    assert b"compiling" in shown
    assert b"\x1b" not in out


def test_no_bar_wipes_the_answer_off_a_terminal(smollm2_path: Path) -> None:
    question = ["-p", "The capital of France is", "--max-tokens", "3"]
    code, shown, _ = on_terminal("generate", smollm2_path, *question)
    assert code == 0
    assert b"compiling" in shown
    assert shown.rpartition(b"\x1b[2K")[2].startswith(b" Paris.")  # \x1b[2K: wipe this line


def test_perplexity_on_a_terminal_ends_its_bars(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("one two three " * 50)
    code, shown, _ = on_terminal("perplexity", tiny, tmp_path / "text", "--context-length", "32")
    assert code == 0
    assert b"compiling" in shown
    last = shown.rpartition(b"\x1b")[2].removeprefix(b"[2K").decode()
    assert float(last) > 1


def test_chat_on_a_terminal_says_how_to_leave(tiny: Path) -> None:
    code, shown, _ = on_terminal("chat", tiny, typed=b"/help\n/exit\n")
    assert code == 0
    assert shown.count(b"/exit or Ctrl-D ends it") == 2  # at the start, and for a command it does not have


def test_an_error_on_a_terminal_is_one_line() -> None:
    code, shown, _ = on_terminal("generate", "nosuch", "-p", "x")
    assert code == 2
    assert shown.startswith(b"error: ")
    assert shown.count(b"\n") == 1


# --- the default model


def test_the_capital_of_france(realm: Realm, smollm2_path: Path) -> None:
    done = realm("generate", smollm2_path, "-p", "The capital of France is", "--max-tokens", "8")
    assert (done.code, done.err) == (0, "")
    assert "Paris" in done.out


def test_chat_with_the_default_model(realm: Realm, smollm2_path: Path) -> None:
    question = ["-p", "What is the capital of France? Answer in one word.", "--chat", "--max-tokens", "16"]
    result = json.loads(realm("generate", smollm2_path, *question, "--system", "Be brief.", "--json").out)
    assert result["usage"]["prompt_tokens"] > 20  # the template was applied
    assert result["text"]


def test_bench_reports_every_figure(realm: Realm, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realm_jax import bench

    monkeypatch.setattr(bench, "_DECODED", 4)
    done = realm("bench", tiny, "--json")
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    rates = {"prefill_128", "prefill_256", "decode_1", "decode_2", "decode_4", "decode_8"}
    assert rates <= set(figures)
    assert all(figures[rate] > 0 for rate in rates)
    assert 0 < figures["resident_bytes"] <= 1.25 * figures["file_bytes"] + 4096


def test_adapters_drafts_and_grammars_end_to_end(realm: Realm, tiny: Path, tmp_path: Path) -> None:
    """What `realm generate` prints with each is what Python gives."""
    shapes = weight_shapes(load_model(tiny))
    write_gguf(random_adapter(shapes, 4), tmp_path / "adapter.gguf", 8.0)
    options = ["-p", "the cat", "--max-tokens", "12", "--ignore-eos", "--json"]

    def answer(*more: str) -> dict:
        return json.loads(realm("generate", tiny, *options, *more).out)

    plain = answer()
    drafted = answer("--draft", str(tiny), "--speculate", "3")
    assert drafted["tokens"] == plain["tokens"]
    assert set(drafted["speculation"]) == {"rounds", "drafted", "accepted", "acceptance"}
    adapted = answer("--adapter", f"mine={tmp_path / 'adapter.gguf'}", "--draft", "ngram")
    assert adapted["tokens"] != plain["tokens"]
    assert answer("--adapter", str(tmp_path / "adapter.gguf"), "--adapter-scale", "0")["tokens"] == plain["tokens"]
    schema = '{"enum": ["yes", "no"]}'
    assert answer("--json-schema", schema)["text"] in ('"yes"', '"no"')
