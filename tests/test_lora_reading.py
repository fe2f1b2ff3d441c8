"""Adapters from GGUF files and PEFT folders: one content either way, and everything wrong refused by name, soon."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_adapters import random_adapter
from safetensors.numpy import load_file, save_file

from realm_jax.errors import AdapterError
from realm_jax.lora import Adapter, read_adapter, weight_shapes
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.lora.peft_format import CONFIG, WEIGHTS, permuted_rows, write_peft
from realm_jax.model import load_model
from realm_jax.model.adapters import EMBEDDING, HEAD
from realm_jax.model.params import Model

SOON = 1.0  # seconds
NAN, INF = float("nan"), float("inf")
Q = "blk.1.attn_q.weight"
MODULE = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    folder, known = tmp_path_factory.mktemp("models"), {}

    def get(case: str) -> Model:
        if case not in known:
            tiny_models.write_tiny_model(case, folder / "model.gguf")
            known[case] = load_model(folder / "model.gguf")
        return known[case]

    return get


@pytest.fixture(scope="module")
def llama(models) -> Model:
    return models("llama")


def read(path: Path, model: Model) -> Adapter:
    return read_adapter(path, model.config, weight_shapes(model))


def q_only(model: Model, rank: int = 4) -> Adapter:
    return random_adapter(weight_shapes(model), rank, takes=lambda place: place == ("attn_q.weight", 1))


# Both forms, one content


@pytest.mark.parametrize("case", ["llama", "granite", "qwen2", "phi3", "qwen2moe", "deepseek2"])
def test_both_forms_give_the_same_adapter(case: str, models, tmp_path: Path) -> None:
    model = models(case)
    adapter = random_adapter(weight_shapes(model), 3, architecture=model.config.architecture)
    write_gguf(adapter, tmp_path / "a.gguf", 8.0)
    write_peft(adapter, model.config, tmp_path / "peft")
    for path in (tmp_path / "a.gguf", tmp_path / "peft"):
        got = read(path, model)
        assert got.content_hash == adapter.content_hash
        assert (got.rank, got.nbytes, got.roles) == (3, adapter.nbytes, adapter.roles)
        assert list(got.pairs) == list(adapter.pairs)
        for place, pair in got.pairs.items():
            np.testing.assert_array_equal(pair.a, adapter.pairs[place].a, err_msg=str(place))
            np.testing.assert_array_equal(pair.b, adapter.pairs[place].b, err_msg=str(place))
            assert pair.scale == adapter.pairs[place].scale
    assert {EMBEDDING, HEAD} <= adapter.roles


def test_query_rows_are_in_the_converters_order(llama: Model, tmp_path: Path) -> None:
    """A head of 16: Hugging Face's row j turns with row j + 8, a GGUF file's rows 2j and 2j + 1 with each other."""
    rows = np.arange(32, dtype=np.float32)[:, None]
    want = [8 * (i % 2) + i // 2 for i in range(16)]
    np.testing.assert_array_equal(permuted_rows(rows, 2)[:, 0], [*want, *(16 + i for i in want)])
    np.testing.assert_array_equal(permuted_rows(permuted_rows(rows, 2), 2, undo=True), rows)
    write_peft(random_adapter(weight_shapes(llama), 1), llama.config, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    pairs = read(tmp_path, llama).pairs
    for module, role, heads in (("q_proj", "attn_q.weight", 4), ("k_proj", "attn_k.weight", 2)):
        b = stored[f"base_model.model.model.layers.0.self_attn.{module}.lora_B.weight"]
        np.testing.assert_array_equal(pairs[role, 0].b, permuted_rows(b, heads))
    v = stored["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
    np.testing.assert_array_equal(pairs["attn_v.weight", 0].b, v)


@pytest.mark.parametrize("ggml_type", ["F32", "BF16", "Q8_0"])
def test_types_of_tensors(ggml_type: str, llama: Model, tmp_path: Path) -> None:
    adapter = random_adapter(weight_shapes(llama), 32, dtype=np.float32)
    write_gguf(adapter, tmp_path / "a.gguf", 8.0, ggml_type=ggml_type)
    kind = gguf.GGMLQuantizationType[ggml_type]
    for place, pair in read(tmp_path / "a.gguf", llama).pairs.items():
        for got, want in ((pair.a, adapter.pairs[place].a), (pair.b, adapter.pairs[place].b)):
            stored = gguf.quants.dequantize(gguf.quants.quantize(want, kind), kind).reshape(want.shape)
            np.testing.assert_array_equal(np.asarray(got, np.float32), stored)


def test_bfloat16_peft(llama: Model, tmp_path: Path) -> None:
    adapter = random_adapter(weight_shapes(llama), 4, dtype=ml_dtypes.bfloat16)
    write_peft(adapter, llama.config, tmp_path, dtype=ml_dtypes.bfloat16)
    assert read(tmp_path, llama).content_hash == adapter.content_hash


def test_the_hash_tells_contents_apart(llama: Model) -> None:
    one = q_only(llama)
    hashes = {one.content_hash, q_only(llama, 5).content_hash}
    for change in ({"seed": 1}, {"alpha": 8.5}, {"takes": lambda place: place == ("attn_q.weight", 2)}):
        takes = {"takes": lambda place: place == ("attn_q.weight", 1)}
        hashes.add(random_adapter(weight_shapes(llama), 4, **{**takes, **change}).content_hash)
    assert len(hashes) == 5
    wide = random_adapter(weight_shapes(llama), 4, takes=lambda place: place == ("attn_q.weight", 1))
    assert wide.content_hash == one.content_hash


# What the config of PEFT says


def peft(folder: Path, model: Model, adapter: Adapter | None = None, **config) -> Path:
    """A folder with some of its config replaced; None takes a key away."""
    write_peft(adapter or q_only(model), model.config, folder)
    values = json.loads((folder / CONFIG).read_text()) | config
    values = {key: value for key, value in values.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


def test_rslora_and_patterns(llama: Model, tmp_path: Path) -> None:
    [pair] = read(peft(tmp_path, llama, use_rslora=True, lora_alpha=6), llama).pairs.values()
    assert pair.scale == 3.0  # 6 / sqrt(4)
    taken = {("attn_q.weight", 0): 2, ("attn_q.weight", 1): 4, ("attn_v.weight", 0): 2, (HEAD, None): 4}
    adapter = random_adapter(weight_shapes(llama), 2, takes=lambda place: place in taken)
    write_peft(adapter, llama.config, tmp_path)
    wide = random_adapter(weight_shapes(llama), 4, takes=lambda place: taken.get(place) == 4)
    write_peft(wide, llama.config, tmp_path / "wide")
    save_file(load_file(tmp_path / WEIGHTS) | load_file(tmp_path / "wide" / WEIGHTS), tmp_path / WEIGHTS)
    values = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 8,
        "rank_pattern": {"lm_head": 4, r"layers\.[1-2].self_attn.q_proj": 4},
        "alpha_pattern": {"^model.layers.0.self_attn.(q_proj|k_proj)": 1, r"layers.\d+.self_attn.q_proj": 20},
    }
    (tmp_path / CONFIG).write_text(json.dumps(values))
    got = {place: (pair.rank, pair.scale) for place, pair in read(tmp_path, llama).pairs.items()}
    assert got == {
        ("attn_q.weight", 0): (2, 0.5),
        ("attn_q.weight", 1): (4, 5.0),
        ("attn_v.weight", 0): (2, 4.0),
        (HEAD, None): (4, 2.0),
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; 'LORA' is accepted"),
        ({"peft_type": ...}, "peft_type is null"),
        ({"use_dora": True}, "use_dora is true, which is not supported; accepted: false"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"use_dora": 0}, "use_dora is 0"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"r": 0}, "r is 0; a rank of at least 1"),
        ({"r": ...}, "r is null"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": 8}, "the matrices have rank 4, but adapter_config.json says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "the matrices have rank 4, but adapter_config.json says 2"),
        ({"lora_alpha": ...}, "lora_alpha is null; a finite number"),
        ({"lora_alpha": NAN}, "lora_alpha is NaN"),
        ({"lora_alpha": INF}, "lora_alpha is Infinity"),
        ({"lora_alpha": 10**60}, "lora_alpha is 1000"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"rank_pattern": [1]}, "rank_pattern is no object"),
        ({"alpha_pattern": {"(a+)+b": 2}}, r"alpha_pattern has the pattern '\(a\+\)\+b'"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern has the pattern '\('"),
        ({"alpha_pattern": {"q_proj": NAN}}, "alpha_pattern 'q_proj' is NaN"),
    ],
    ids=str,
)
def test_configs_that_are_refused(config: dict, message: str, llama: Model, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message) as error:
        read(peft(tmp_path, llama, **config), llama)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000, " " * (2 << 20)], ids=lambda t: repr(t[:4]))
def test_configs_that_are_no_config(text: str, llama: Model, tmp_path: Path) -> None:
    peft(tmp_path, llama)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(AdapterError, match=CONFIG):
        read(tmp_path, llama)


# What tensors may be there


def zeros(*shape: int, dtype=np.float16) -> np.ndarray:
    return np.zeros(shape, dtype)


# Changes to a folder that holds q_proj of layer 1, rank 4 (None: the tensor goes), and what is said.
TENSORS = {
    "no B": ({f"{MODULE}.lora_B.weight": None}, r"module model\.layers\.1\.self_attn\.q_proj: there is no B"),
    "no A": ({f"{MODULE}.lora_A.weight": None}, "there is no A"),
    "nothing": (
        {f"{MODULE}.lora_A.weight": None, f"{MODULE}.lora_B.weight": None},
        "it holds no matrices",
    ),
    "ranks": ({f"{MODULE}.lora_A.weight": zeros(3, 64)}, "A has rank 3 and B rank 4"),
    "rank 0": (
        {f"{MODULE}.lora_A.weight": zeros(0, 64), f"{MODULE}.lora_B.weight": zeros(64, 0)},
        "the rank is 0; 1 to 1024",
    ),
    "rank 2000": (
        {f"{MODULE}.lora_A.weight": zeros(2000, 64), f"{MODULE}.lora_B.weight": zeros(64, 2000)},
        "the rank is 2000",
    ),
    "another model": (
        {f"{MODULE}.lora_A.weight": zeros(4, 128)},
        "from 128 to 64 elements, but the base model's matrix goes from 64 to 64: it was made for another model",
    ),
    "axes": ({f"{MODULE}.lora_A.weight": zeros(4, 64, 1)}, "two axes each"),
    "integers": ({f"{MODULE}.lora_A.weight": zeros(4, 64, dtype=np.int8)}, "is of type I8; accepted: F32, F16, BF16"),
    "NaN": ({f"{MODULE}.lora_A.weight": zeros(4, 64) + np.float16(NAN)}, "A holds values that are not finite"),
    "infinite": ({f"{MODULE}.lora_B.weight": zeros(64, 4) + np.float16(INF)}, "B holds values that are not finite"),
    "DoRA": ({f"{MODULE}.lora_magnitude_vector": zeros(64)}, "lora_magnitude_vector' is no part of a plain LoRA"),
    "a bias": ({f"{MODULE}.lora_B.bias": zeros(64)}, "is no part of a plain LoRA"),
    "a whole matrix": ({"base_model.model.lm_head.weight": zeros(2, 2)}, "is no part of a plain LoRA"),
    "unknown module": (
        {"base_model.model.model.layers.1.conv.lora_A.weight": zeros(4, 64)},
        r"module 'model\.layers\.1\.conv' is not one Realm applies adapters to; accepted: embed_tokens, lm_head, and",
    ),
    "experts": (
        {"base_model.model.model.layers.1.mlp.experts.0.up_proj.lora_A.weight": zeros(4, 64)},
        r"module 'model\.layers\.1\.mlp\.experts\.0\.up_proj' is not one",
    ),
    "layer 9": (
        {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": zeros(4, 64)},
        r"is for blk\.9\.ffn_up\.weight, which the base model \(llama\) does not have",
    ),
    "fused": (
        {"base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight": zeros(4, 64)},
        r"is for blk\.1\.attn_qkv\.weight, which the base model",
    ),
    "embedding as linear": (
        {"base_model.model.model.embed_tokens.lora_A.weight": zeros(4, 64)},
        "lora_embedding_A and _B are for embed_tokens",
    ),
    "twice": (
        {f"{MODULE}.lora_A.weight".replace("model.layers", "language_model.model.layers"): zeros(4, 64)},
        r"are both blk\.1\.attn_q\.weight",
    ),
    "long name": ({"base_model.model." + "x" * 5000: zeros(1)}, r"'base_model\.model\.x+'\.\.\. is no part"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_folders_that_are_refused(what: str, llama: Model, tmp_path: Path) -> None:
    changes, message = TENSORS[what]
    peft(tmp_path, llama)
    tensors = load_file(tmp_path / WEIGHTS) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=message) as error:
        read(tmp_path, llama)
    assert len(str(error.value)) < 1500
    assert str(tmp_path) in str(error.value)


# A GGUF file as it should be, by metadata key and tensor, for tests to change one thing.
METADATA = {
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 8.0,
}


def write_changed(path: Path, tensors: dict, metadata: dict, architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in (METADATA | metadata).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_array(key, value)
    good = {f"{Q}.lora_a": zeros(4, 64), f"{Q}.lora_b": zeros(64, 4)}
    for name, values in (good | tensors).items():
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FILES = {
    "a model": ({}, {"general.type": "model"}, "general.type is 'model'; 'adapter' is accepted"),
    "no type": ({}, {"general.type": None}, "general.type is missing"),
    "a control vector": ({}, {"adapter.type": "cvec"}, "adapter.type is 'cvec'; 'lora' is accepted"),
    "no alpha": ({}, {"adapter.lora.alpha": None}, "adapter.lora.alpha is missing"),
    "alpha NaN": ({}, {"adapter.lora.alpha": NAN}, "adapter.lora.alpha is nan"),
    "alpha infinite": ({}, {"adapter.lora.alpha": -INF}, "adapter.lora.alpha is -inf"),
    "alpha 0": ({}, {"adapter.lora.alpha": 0.0}, "adapter.lora.alpha is 0.0"),
    "alpha a text": ({}, {"adapter.lora.alpha": "8"}, "adapter.lora.alpha is no number"),
    "activated": ({}, {"adapter.alora.invocation_tokens": [1, 2]}, "an activated LoRA"),
    "no B": ({f"{Q}.lora_b": None}, {}, r"blk\.1\.attn_q\.weight: there is no \.lora_b"),
    "no A": ({f"{Q}.lora_a": None}, {}, r"there is no \.lora_a"),
    "nothing": ({f"{Q}.lora_a": None, f"{Q}.lora_b": None}, {}, "it holds no matrices"),
    "ranks": ({f"{Q}.lora_b": zeros(64, 5)}, {}, "A has rank 4 and B rank 5"),
    "another model": ({f"{Q}.lora_b": zeros(32, 4)}, {}, "from 64 to 32 elements"),
    "transposed": ({f"{Q}.lora_a": zeros(64, 4)}, {}, "A has rank 64 and B rank 4"),
    "embedding": (
        {f"{EMBEDDING}.lora_a": zeros(4, 260), f"{EMBEDDING}.lora_b": zeros(64, 4)},
        {},
        "token_embd.weight: A has rank 260 and B rank 4",
    ),
    "type": ({f"{Q}.lora_a": zeros(4, 64, dtype=np.int32)}, {}, "is of type I32; accepted: F32, F16, BF16, Q8_0"),
    "NaN": ({f"{Q}.lora_b": zeros(64, 4) + np.float16(NAN)}, {}, "B holds values that are not finite"),
    "a norm": ({"blk.0.attn_norm.weight": zeros(64)}, {}, "is no part of a LoRA adapter"),
    "a vector": (
        {"blk.0.attn_norm.weight.lora_a": zeros(4, 64)},
        {},
        r"is for blk\.0\.attn_norm\.weight, which the base model",
    ),
    "layer 7": ({"blk.7.attn_q.weight.lora_a": zeros(4, 64)}, {}, r"is for blk\.7\.attn_q\.weight, which"),
    "a layer's name": ({"blk.01.attn_q.weight.lora_a": zeros(4, 64)}, {}, "there are two matrices A"),
    "no layer": ({"attn_q.weight.lora_a": zeros(4, 64)}, {}, r"is for attn_q\.weight, which the base model"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_refused(what: str, llama: Model, tmp_path: Path) -> None:
    tensors, metadata, message = FILES[what]
    path = tmp_path / "a.gguf"
    write_changed(path, tensors, metadata)
    with pytest.raises(AdapterError, match=message) as error:
        read(path, llama)
    assert str(path) in str(error.value)


def test_other_bases_are_refused(models, llama: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_changed(path, {}, {}, architecture="qwen2")
    with pytest.raises(AdapterError, match=r"general\.architecture is 'qwen2'; 'llama' is accepted"):
        read(path, llama)
    moe = models("qwen2moe")
    write_changed(path, {"blk.0.ffn_up_exps.weight.lora_a": zeros(4, 64)}, {}, architecture="qwen2moe")
    with pytest.raises(AdapterError, match=r"for blk\.0\.ffn_up_exps\.weight, a stack of experts' or heads' matrices"):
        read(path, moe)
    tiny_models.write_tiny_model("llama", path)
    with pytest.raises(AdapterError, match=r"general\.type is missing; 'adapter' is accepted"):
        read(path, llama)


# Hostile bytes


def good_forms(model: Model, folder: Path) -> list[tuple[Path, Path]]:
    """A file and a folder, each with the path whose bytes a test may damage."""
    adapter = random_adapter(weight_shapes(model), 2, takes=lambda place: place[1] == 0)
    write_gguf(adapter, folder / "a.gguf", 8.0)
    write_peft(adapter, model.config, folder / "peft")
    return [(folder / "a.gguf", folder / "a.gguf"), (folder / "peft", folder / "peft" / WEIGHTS)]


@pytest.mark.parametrize("form", [0, 1], ids=["gguf", "peft"])
def test_truncated_files(form: int, llama: Model, tmp_path: Path) -> None:
    path, damaged = good_forms(llama, tmp_path)[form]
    raw = damaged.read_bytes()
    for size in (0, 1, 4, 8, 9, 100, len(raw) // 2, len(raw) - 33):
        damaged.write_bytes(raw[:size])
        started = time.perf_counter()
        with pytest.raises(AdapterError) as error:
            read(path, llama)
        assert time.perf_counter() - started < SOON
        assert str(path) in str(error.value)


@pytest.mark.parametrize("form", [0, 1], ids=["gguf", "peft"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_are_refused_or_read(form: int, data: st.DataObject, llama: Model, tmp_path: Path) -> None:
    path, damaged = good_forms(llama, tmp_path)[form]
    raw = bytearray(damaged.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    damaged.write_bytes(raw)
    started = time.perf_counter()
    with contextlib.suppress(AdapterError):  # anything else fails the test
        adapter = read(path, llama)
        assert all(np.isfinite(pair.a).all() and np.isfinite(pair.b).all() for pair in adapter.pairs.values())
    assert time.perf_counter() - started < SOON


def test_headers_that_promise_too_much(llama: Model, tmp_path: Path) -> None:
    peft(tmp_path, llama)
    for header in (
        (1 << 62).to_bytes(8, "little"),
        (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4],"data_of',
        (64).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}'[:64],
    ):
        (tmp_path / WEIGHTS).write_bytes(header)
        with pytest.raises(AdapterError, match=WEIGHTS):
            read(tmp_path, llama)


def test_paths_that_hold_no_adapter(llama: Model, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.gguf", "there is no such file or folder"),
        (tmp_path, "there is no adapter_config.json in it"),
        (Path("a\0b"), "no such file|null"),  # as Python's version has it
        (Path("x" * 5000), "no such file|too long"),
    ):
        with pytest.raises(AdapterError, match=message):
            read(path, llama)
    peft(tmp_path, llama)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=f"there is no {WEIGHTS} in it"):
        read(tmp_path, llama)
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="no regular file"):
        read(tmp_path, llama)
    with pytest.raises(AdapterError, match="a pipe"):
        read(tmp_path / WEIGHTS, llama)
    shutil.rmtree(tmp_path)


def test_writing_refuses_what_a_form_cannot_hold(llama: Model, tmp_path: Path) -> None:
    mixed = random_adapter(weight_shapes(llama), lambda place: 2 if place[1] == 0 else 4)
    with pytest.raises(AdapterError, match="2 ranks and scales; one for all is accepted"):
        write_peft(mixed, llama.config, tmp_path)
    write_gguf(mixed, tmp_path / "a.gguf", 8.0)  # alpha is the same for all, and ranks are the tensors' own
    assert read(tmp_path / "a.gguf", llama).content_hash == mixed.content_hash
    with pytest.raises(AdapterError, match=r"scale 4 at rank 2; a GGUF file holds one alpha for all, and 4 was given"):
        write_gguf(mixed, tmp_path / "b.gguf", 4.0)
