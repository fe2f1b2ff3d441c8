"""Bad input through the public faces: one typed line, soon, and nothing left behind.

Hostile bytes of a file are in test_gguf_hostile, arguments of LLM in test_llm_refusals, vocabularies in
test_text_vocabulary; here is what a well-formed file can say that is wrong, and what surrounds the process.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import TensorSpec, tiny_spec, write_spec

from realm_jax import LLM, SamplingParams
from realm_jax.cli.app import run
from realm_jax.engine import executor as executor_module
from realm_jax.engine.compile_cache import enable_compile_cache
from realm_jax.errors import CapacityError, GGUFError, InvalidRequestError, RealmError, UnsupportedModelError
from realm_jax.gguf import GGMLType, open_gguf
from realm_jax.model import capacity, check_model
from realm_jax.text import load_tokenizer

GREEDY = SamplingParams(max_tokens=2)
SOON = 2.0  # seconds; most take milliseconds
NAN = float("nan")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bad") / "tiny.gguf"
    spec = tiny_spec("llama")
    spec.metadata["llama.context_length"] = 2**31 - 1
    write_spec(spec, path, label="llama")
    return path


@pytest.fixture(scope="module")
def llm(tiny):
    with LLM(tiny, context_length=256, max_batch=4) as llm:
        yield llm


def inspect(path: Path) -> None:
    """What `realm inspect` checks."""
    with open_gguf(path) as file:
        check_model(file)
        load_tokenizer(file)


def pages_are_free(llm: LLM) -> bool:
    pages = llm._loop.scheduler.pages
    return pages.free == pages.total


# What a well-formed file says: (case, metadata below the architecture's prefix, what the message names)
METADATA = [
    ("llama", {"block_count": 0}, "block_count is 0"),
    ("llama", {"block_count": 10**9}, "block_count is 1000000000"),
    ("llama", {"block_count": 4}, "blk.3.attn_norm.weight is missing"),
    ("llama", {"block_count": 2}, "blk.2.attn_norm.weight is not one"),
    ("llama", {"block_count": 3.0}, "block_count is 3.0; it must be an integer"),
    ("llama", {"block_count": True}, "block_count is True"),
    ("llama", {"attention.head_count": 0}, "head_count is 0"),
    ("llama", {"attention.head_count": 2**31}, "head_count is 2147483648"),
    ("llama", {"attention.head_count": 3}, "3 attention heads do not share 2"),
    ("llama", {"attention.head_count": [4, 4]}, r"head_count is \[4, 4\].*3 layers"),
    ("llama", {"attention.head_count": [4, 2, 4]}, r"\[4, 2, 4\]"),
    ("llama", {"attention.head_count_kv": 0}, "head_count_kv is 0"),
    ("llama", {"attention.head_count_kv": 4}, "attn_k.weight has shape"),
    ("llama", {"embedding_length": 0}, "embedding_length is 0"),
    ("llama", {"embedding_length": 63}, "63 is no multiple of 4 heads"),
    ("llama", {"embedding_length": 2**31}, "embedding_length is 2147483648"),
    ("llama", {"context_length": 0}, "context_length is 0"),
    ("llama", {"context_length": 2**31}, "context_length is 2147483648"),
    ("llama", {"context_length": "512"}, "context_length is '512'"),
    ("llama", {"attention.layer_norm_rms_epsilon": NAN}, "epsilon is nan"),
    ("llama", {"attention.layer_norm_rms_epsilon": -1e-5}, "epsilon is -9.99"),
    ("llama", {"rope.dimension_count": 0}, "dimension_count is 0"),
    ("llama", {"rope.dimension_count": 15}, "dimension_count is 15; it must be even"),
    ("llama", {"rope.dimension_count": 18}, "dimension_count is 18"),
    ("llama", {"rope.freq_base": NAN}, "freq_base is nan"),
    ("llama-yarn", {"rope.freq_base": 1.0}, "freq_base is 1.0"),
    ("llama", {"rope.scaling.factor": -1.0}, "factor is -1.0"),
    ("llama", {"rope.scaling.type": "x" * 10**6}, "rope scaling type 'xxx"),
    ("llama", {"rope.scaling.type": "longrope"}, "rope_factors_long.weight is missing"),
    ("qwen2", {"rope.scaling.type": "longrope"}, "longrope is not supported for this architecture"),
    ("llama", {"x" * 60000: 1}, "is unknown for this architecture"),
    ("llama", {"attention.causal": False}, "causal is false"),
    ("llama", {"pooling_type": 4}, "pooling_type is 4"),
    ("llama-moe", {"expert_used_count": 6}, "expert_used_count is 6"),
    ("llama-moe", {"expert_count": 2**31}, "expert_count is 2147483648"),
    ("gemma2", {"attention.sliding_window": 2**31}, "sliding_window is 2147483648"),
    ("gemma2", {"attn_logit_softcapping": NAN}, "softcapping is nan"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "softcapping is -1.0"),
    ("gemma3", {"attention.sliding_window_pattern": [True]}, "one flag for each of 8 layers"),
    ("granite", {"logit_scale": 0.0}, "logit_scale is 0"),
    ("deepseek2", {"expert_group_count": 3}, "expert_group_count 3"),
]

# Tensors: (case, name -> shape, or None to leave it out, what the message names)
TENSORS = [
    ("llama", {"token_embd.weight": None}, "token_embd.weight is missing"),
    ("llama", {"token_embd.weight": (287, 64)}, "287 rows, and the vocabulary has 288 tokens"),
    ("llama", {"output.weight": (64, 288)}, r"output.weight has shape \(64, 288\)"),
    ("llama", {"blk.1.attn_q.weight": (2, 2, 2, 2)}, r"attn_q.weight has shape \(2, 2, 2, 2\)"),
    ("llama", {"blk.2.ffn_norm.weight": (1,)}, r"ffn_norm.weight has shape \(1,\)"),
    ("llama", {"blk.0.extra.weight": (3,)}, "blk.0.extra.weight is not one"),
    ("llama", {"blk.01.attn_q.weight": (64, 64)}, "blk.01.attn_q.weight is not one"),
    ("llama-longrope", {"rope_factors_short.weight": None}, "rope_factors_short.weight is missing"),
    ("phi3-longrope-long", {"rope_factors_long.weight": None}, "rope_factors_long.weight is missing"),
]


@pytest.mark.parametrize(
    ("case", "changes", "message"), METADATA + TENSORS, ids=[m[:40] for _, _, m in METADATA + TENSORS]
)
def test_inspecting_and_loading_refuse_the_same(tmp_path, case, changes, message):
    spec = tiny_spec(case)
    for name, value in changes.items():
        if name.endswith(".weight"):
            spec.tensors.pop(name, None)
            if value is not None:
                spec.tensors[name] = TensorSpec(value, "linear")
        else:
            spec.metadata[f"{spec.architecture}.{name}"] = value
    write_spec(spec, tmp_path / "bad.gguf", label=case)
    started = time.monotonic()
    with pytest.raises((GGUFError, UnsupportedModelError), match=message) as inspected:
        inspect(tmp_path / "bad.gguf")
    with pytest.raises(type(inspected.value)) as loaded:
        LLM(tmp_path / "bad.gguf")
    assert time.monotonic() - started < SOON
    text = str(inspected.value)
    assert text == str(loaded.value)
    assert "\n" not in text
    assert len(text) < 500


@pytest.mark.parametrize("type", [GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64])
def test_integers_are_no_weights(tiny, type):
    with open_gguf(tiny) as file:
        tensors = dict(file.tensors)
        tensors["blk.1.attn_q.weight"] = dataclasses.replace(tensors["blk.1.attn_q.weight"], type=type)
        with pytest.raises(UnsupportedModelError, match=f"blk.1.attn_q.weight is of type {type.name}"):
            check_model(SimpleNamespace(metadata=file.metadata, tensors=tensors))


@pytest.mark.parametrize("value", [NAN, float("inf"), 3e38])
def test_weights_that_are_no_numbers_end_a_request_only(tmp_path, value):
    spec = tiny_spec("llama")
    spec.tensors["output_norm.weight"] = TensorSpec((64,), "fixed", values=(value,) * 64)
    write_spec(spec, tmp_path / "bad.gguf", label="llama")
    with LLM(tmp_path / "bad.gguf") as llm:
        for _ in range(2):
            with pytest.raises(RealmError, match="logits at position 2 are not finite"):
                llm.generate("the cat"[:2], GREEDY)
            assert pages_are_free(llm)


# Memory


def test_a_context_larger_than_the_memory_is_refused_before_loading(tiny):
    started = time.monotonic()
    with pytest.raises(CapacityError, match="the cache 1,649,267,441,664 for a context of 2147483647 tokens"):
        LLM(tiny, context_length=2**31 - 1, backend="xla")  # whose cache rows are float32
    assert time.monotonic() - started < SOON


def test_a_small_file_cannot_ask_for_a_huge_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "memory_limit", lambda: 1 << 29)
    spec = tiny_spec("llama")
    layers, heads, dim = 1, 64, 256
    spec.tensors = {name: tensor for name, tensor in spec.tensors.items() if not name.startswith(("blk.1", "blk.2"))}
    spec.metadata |= {
        "llama.block_count": layers,
        "llama.context_length": 4096,
        "llama.embedding_length": 1,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": heads,
        "llama.attention.key_length": dim,
        "llama.attention.value_length": dim,
        "llama.feed_forward_length": 1,
        "llama.rope.dimension_count": dim,
    }
    wide = {"attn_q": (heads * dim, 1), "attn_k": (heads * dim, 1), "attn_v": (heads * dim, 1)}
    narrow = {"attn_output": (1, heads * dim), "ffn_gate": (1, 1), "ffn_up": (1, 1), "ffn_down": (1, 1)}
    for name, shape in (wide | narrow | {"attn_norm": (1,), "ffn_norm": (1,)}).items():
        spec.tensors[f"blk.0.{name}.weight"] = TensorSpec(shape, "norm")
    for name, shape in {"token_embd": (288, 1), "output_norm": (1,), "output": (288, 1)}.items():
        spec.tensors[f"{name}.weight"] = TensorSpec(shape, "norm")
    write_spec(spec, tmp_path / "wide.gguf", label="wide")
    assert (tmp_path / "wide.gguf").stat().st_size < 1 << 20
    with pytest.raises(
        CapacityError, match=r"the cache 536,870,912 for a context of 4096 .* 536,870,912 bytes of memory"
    ):
        LLM(tmp_path / "wide.gguf", backend="xla")


def test_compiled_programs_are_not_cached_on_a_full_disk(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("REALM_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        enable_compile_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert "is almost full" in caplog.text


def test_the_memory_of_this_machine_is_known():
    limit = capacity.memory_limit()
    assert limit is None or limit > 1 << 28


def test_running_out_of_memory_on_the_device_ends_a_request_only(llm, monkeypatch):
    expected = llm.generate("the cat", GREEDY).tokens

    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\nmore")

    llm._core.runner.reset()
    with monkeypatch.context() as patch:
        patch.setattr(executor_module, "allocate_pages", exhausted)
        with pytest.raises(CapacityError, match=r"out of memory .*8589934592 bytes") as caught:
            llm.generate("the cat", GREEDY)
    assert "\n" not in str(caught.value)
    assert pages_are_free(llm)
    assert llm.generate("the cat", GREEDY).tokens == expected


# Arguments


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate(Unshowable()),
        lambda llm: llm.generate([Unshowable()]),
        lambda llm: llm.stream(Unshowable()),
        lambda llm: llm.tokenize(Unshowable()),
        lambda llm: llm.generate("the", Unshowable()),
        lambda llm: SamplingParams(temperature=Unshowable()),
        lambda llm: SamplingParams(stop=[Unshowable()]),
        lambda llm: llm.generate("the", SamplingParams(max_tokens=10**5000)),
        lambda llm: llm.generate([10**5000]),
    ],
)
def test_what_cannot_be_shown_is_refused_all_the_same(llm, call):
    with pytest.raises(InvalidRequestError) as caught:
        call(llm)
    assert len(str(caught.value)) < 500


def test_requests_of_thousands_of_prompts(llm):
    results = llm.generate(["a"] * 2000, SamplingParams(max_tokens=1))
    assert len(results) == 2000
    with pytest.raises(InvalidRequestError, match="prompt 1999: the prompt is empty"):
        llm.generate(["a"] * 1999 + [""], SamplingParams(max_tokens=1))
    assert pages_are_free(llm)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_use_after_a_fork_is_refused(llm):
    llm.generate("the", GREEDY)
    child = os.fork()
    if not child:
        try:
            llm.generate("the", GREEDY)
        except InvalidRequestError as error:
            os._exit(0 if "before a fork" in str(error) else 3)
        os._exit(4)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child waits for ever")


# The command line and what surrounds it


@pytest.mark.parametrize("command", ["inspect", "tokenize", "generate", "perplexity"])
@pytest.mark.parametrize("kind", ["missing", "picture", "empty", "folder", "device", "pipe"])
def test_files_of_the_wrong_kind(tmp_path, capsys, command, kind):
    text = tmp_path / "text.txt"
    text.write_text("the cat")
    file = tmp_path / "model.gguf"
    if kind == "picture":
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file = Path("/dev/zero")
    more = {"inspect": [], "tokenize": ["the"], "generate": ["-p", "the"], "perplexity": [str(text)]}[command]
    started = time.monotonic()
    assert run([command, str(file), *more]) == 2
    assert time.monotonic() - started < SOON
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def shell(line: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run realm with its arguments as $@ of a shell line."""
    command = [sys.executable, "-m", "realm_jax.cli", *map(str, arguments)]
    return subprocess.run(
        ["sh", "-c", line, "sh", *command], capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize(
    ("line", "arguments", "code"),
    [
        ('exec "$@" >&-', ["inspect"], 0),
        ('exec "$@" >&- 2>&- <&-', ["inspect"], 0),
        ('exec "$@" <&-', ["tokenize", "-"], 0),
        ('exec "$@" 2>&-', ["tokenize", "\udcff"], 2),
        ('exec "$@" 2>/dev/full', ["tokenize", "\udcff"], 2),
        ('exec "$@" >/dev/full', ["tokenize", "the"], 2),
        ('exec "$@" </dev/zero', ["tokenize", "-"], 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_standard_streams_that_are_closed_full_or_endless(tiny, line, arguments, code):
    command, *rest = arguments
    result = shell(line, command, tiny, *rest)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") <= 1
    if ">&-" in line or "2>" in line:
        assert not result.stderr


@pytest.mark.parametrize("seconds", [0.3, 0.6, 0.9, 1.2])
def test_an_interrupt_while_starting_ends_quietly(tiny, seconds):
    arguments = [sys.executable, "-m", "realm_jax.cli", "generate", tiny, "-p", "the", "--context-length", "4096"]
    process = subprocess.Popen(
        [*arguments, "--max-tokens", "4000", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert printed == b""
    assert process.returncode in (130, -signal.SIGINT)  # the latter before Python itself has started


def test_a_prompt_of_megabytes_is_refused(llm):
    text = "hello world " * 800_000
    with pytest.raises(InvalidRequestError, match="tokens; accepted: at most 255, as the context holds 256 tokens"):
        llm.generate(text, GREEDY)
    assert pages_are_free(llm)
    with pytest.raises(InvalidRequestError, match="the context holds 256 tokens"):
        llm.logits(np.ones(100_000, np.int64))
