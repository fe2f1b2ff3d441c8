"""Checkpoints: the same bits as the GGUF file, whole or not there, and refused when they are not what was written."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import tiny_models

from realm_jax import LLM, SamplingParams
from realm_jax.checkpoint import CheckpointFile, convert, load_state, open_model, save_state
from realm_jax.checkpoint.file import listed
from realm_jax.checkpoint.header import write_header
from realm_jax.checkpoint.manifest import ADAPTER, MODEL, TRAINING, write_manifest
from realm_jax.cli.app import run
from realm_jax.errors import ChatTemplateError, CheckpointError, GGUFError, ModelNotFoundError
from realm_jax.gguf import open_gguf
from realm_jax.model import check_model, load_model
from realm_jax.model.backend import resolve_backend

NATIVE = pytest.mark.skipif(resolve_backend("auto") != "native", reason="the native kernels are not built")
BACKENDS = ["xla", pytest.param("native", marks=NATIVE)]

# Mixed types, fused projections, experts with biases, latent attention, rope factors and tied heads among them.
CASES = [("llama-Q4_K_M", "F32"), ("phi3-longrope-long", "Q8_0"), ("gpt-oss-MXFP4", "F32"), ("deepseek2", "Q8_0")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file and its checkpoint, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    tiny_models.write_tiny_model("llama-Q8_0", folder / "model.gguf")
    convert(folder / "model.gguf", folder / "model")
    return folder


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, with its GGUF file beside it."""
    shutil.copy(made / "model.gguf", tmp_path)
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


def load(path: Path, backend: str) -> dict[str, np.ndarray]:
    """Every array of a loaded model by its path in the tree, floats as bits."""
    with open_model(path) as file:
        model = load_model(file, 64, backend=backend)
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "kind"), CASES)
def test_the_weights_are_those_of_the_file(case: str, kind: str, backend: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_models.write_tiny_model(case, path, weight_type=kind)
    convert(path, tmp_path / "model")
    expected, found = load(path, backend), load(tmp_path / "model", backend)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert (array.dtype, array.shape) == (found[name].dtype, found[name].shape), name
        assert array.tobytes() == found[name].tobytes(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_answers_are_bit_identical(made: Path, backend: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    given = []
    for model in (made / "model.gguf", made / "model"):
        with LLM(model, context_length=64, backend=backend) as llm:
            logits = llm.logits(tiny_models.token_ids(24))
            params = SamplingParams(max_tokens=8, ignore_eos=True)
            answer = llm.generate("the cat", params).tokens if backend == "native" else None  # compiles more
            given.append((logits.tobytes(), answer, llm.tokenize("the cat"), llm.config))
            with pytest.raises(ChatTemplateError, match="the file has no"):
                llm.chat(messages)
    assert given[0] == given[1]


def test_an_open_checkpoint_tells_what_the_file_tells(made: Path) -> None:
    with open_gguf(made / "model.gguf") as file, open_model(made / "model") as checkpoint:
        assert isinstance(checkpoint, CheckpointFile)
        assert check_model(checkpoint) == check_model(file)
        assert checkpoint.metadata.keys() == file.metadata.keys()
        for name, tensor in file.tensors.items():
            found = checkpoint.tensors[name]
            assert (found.shape, found.type, found.nbytes) == (tensor.shape, tensor.type, tensor.nbytes)
    assert isinstance(open_model(made / "model.gguf").path, Path)


def test_orbax_itself_reads_it(made: Path) -> None:
    [folder] = (made / "model" / "weights").glob("attn_q.weight-*")
    arrays = ocp.PyTreeCheckpointer().restore(folder)
    expected = load(made / "model.gguf", "xla")[".stacks['attn_q.weight:Q8_0'].arrays['codes']"]
    assert np.array_equal(np.asarray(arrays["0.codes"]).reshape(expected.shape), expected)


def test_metadata_comes_back_as_it_was(tmp_path: Path) -> None:
    values = {
        "text": "héllo\udcff",
        "texts": ["", "a", "\udc80"],
        "yes": True,
        "whole": 2**63 + 5,
        "negative": -3,
        "half": 0.1,
        "infinite": float("inf"),
        "floats": np.array([0.1, np.nan], np.float32),
        "bytes": np.array([1, 255], np.uint8),
        "flags": np.array([True, False]),
        "none": np.array([], np.int32),
        "general.alignment": 64,  # of the file it came from, as the keys of a split one
        "split.no": 0,
        "split.count": 2,
    }
    write_header(tmp_path / "header.gguf", values)
    with open_gguf(tmp_path / "header.gguf") as file:
        assert set(values) - set(file.metadata) == {"general.alignment", "split.no", "split.count"}
        for key, found in file.metadata.items():
            if isinstance(found, np.ndarray):
                assert (found.dtype, found.tobytes()) == (values[key].dtype, values[key].tobytes())
            else:
                assert (type(found), found) == (type(values[key]), values[key])


# Damage


def edit(folder: Path, change) -> None:
    fields = json.loads((folder / "realm.json").read_text())
    change(fields)
    (folder / "realm.json").write_text(json.dumps(fields))


def data_files(folder: Path, stack: str = "ffn_up") -> list[Path]:
    """Of a stack's values, the largest first."""
    return sorted((folder / "weights").glob(f"{stack}.*/**/d/*"), key=lambda path: -path.stat().st_size)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def change_a_value(folder: Path) -> None:
    """One bit of a large array, which lies as it is in a file."""
    codes = load(folder, "xla")[".stacks['ffn_up.weight:Q8_0'].arrays['codes']"]
    first = codes[0, :4].tobytes()
    [path] = [path for path in data_files(folder) if first in path.read_bytes()]
    flip(path, path.read_bytes().index(first) + 100)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_link(folder: Path) -> None:
    path, elsewhere = data_files(folder)[0], folder.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


ON_OPENING = {
    "newer": (lambda d: edit(d, lambda f: f.update(format=2)), "written by a newer version .*its format is 2"),
    "newer, all else unknown": (lambda d: (d / "realm.json").write_text('{"format": 7}'), "its format is 7"),
    "no format": (lambda d: edit(d, lambda f: f.pop("format")), "names no format"),
    "realm.json cut": (lambda d: cut_short_json(d), "realm.json is cut short"),
    "realm.json nested": (lambda d: (d / "realm.json").write_text("[" * 100_000), "realm.json is cut short or no JSON"),
    "no files": (lambda d: edit(d, lambda f: f.pop("files")), "no table 'files'"),
    "a file outside": (lambda d: edit(d, lambda f: f["files"].update({"../x": 1})), "lists a file '../x'"),
    "a kind unknown": (lambda d: edit(d, lambda f: f.update(kind="x")), "names no known kind"),
    "another kind": (lambda d: edit(d, lambda f: f.update(kind="adapter")), "of the kind 'adapter'; 'model' is"),
    "no tensors": (lambda d: edit(d, lambda f: f.pop("tensors")), "lists no tensors"),
    "a tensor twice": (lambda d: edit(d, lambda f: f["tensors"].append(f["tensors"][0])), "lists a tensor"),
    "a tensor of no type": (lambda d: edit(d, lambda f: f["tensors"][0].__setitem__(1, [])), "lists a tensor"),
    "the header cut": (lambda d: cut_short(d / "header.gguf"), "'header.gguf' has .* bytes, and had"),
    "the header changed": (lambda d: flip(d / "header.gguf", 100), "'header.gguf' has other content"),
    "values cut": (lambda d: cut_short(data_files(d)[0]), "ffn_up.* bytes, and had"),
    "values missing": (lambda d: data_files(d)[0].unlink(), "ffn_up.* is missing"),
    "a stack missing": (lambda d: shutil.rmtree(d / "weights" / "attn_q.weight-Q8_0"), "is missing"),
    "Orbax's own data changed": (lambda d: flip(d / "weights/vectors/_METADATA", 9), "_METADATA' has other content"),
    "a link": (replace_by_link, "no regular file"),
    "a file too many": (lambda d: (d / "weights" / "x.pkl").write_text("x"), "'weights/x.pkl' does not belong to it"),
}


def cut_short_json(folder: Path) -> None:
    raw = (folder / "realm.json").read_bytes()
    (folder / "realm.json").write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize("damage", ON_OPENING)
def test_damage_is_found_on_opening(damage: str, checkpoint: Path) -> None:
    change, message = ON_OPENING[damage]
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


def index_file(folder: Path) -> Path:
    """Orbax's own, of a stack: which piece of an array lies where."""
    [path] = (folder / "weights" / "ffn_up.weight-Q8_0" / "d").iterdir()
    return path


def double(fields: dict) -> None:
    for row in fields["tensors"]:
        if row[0].endswith("attn_q.weight"):
            row[2][0] *= 2


ON_LOADING = {
    "a value changed": (change_a_value, "ffn_up.*: values of 0.codes are not those that were written"),
    "an index changed": (lambda d: flip(index_file(d), 60), r"ffn_up\S+ cannot be read: Error decoding b-tree node"),
    "a checksum changed": (lambda d: edit(d, lambda f: f["crc32"]["weights/vectors"].clear()), "0 checksums"),
    "a checksum too few": (lambda d: edit(d, lambda f: crcs(f).pop()), "checksums of 0.codes"),
    "another type": (lambda d: edit(d, retype), "attn_q.weight-Q4_0 is missing"),
}


def crcs(fields: dict) -> list[int]:
    return fields["crc32"]["weights/attn_q.weight-Q8_0"]["0.codes"]


def retype(fields: dict) -> None:
    for row in fields["tensors"]:
        if row[0].endswith("attn_q.weight"):
            row[1] = "Q4_0"


@pytest.mark.parametrize("damage", ON_LOADING)
def test_damage_is_found_on_loading(damage: str, checkpoint: Path) -> None:
    change, message = ON_LOADING[damage]
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message), open_model(checkpoint) as file:
        load_model(file, 64)


HOSTILE = {
    "huge": ({"shape": [1 << 20, 1 << 14, 1 << 10, 64]}, r"0\.codes is int8\(1048576, 16384, 1024, 64\), not int8\("),
    "in huge pieces": ({"chunks": [6, 16, 32, 1 << 34]}, "compressed, or cut into pieces larger"),
    "compressed": ({"compressor": {"id": "zstd", "level": 1}}, "compressed, or cut into pieces larger"),
    "of another type": ({"dtype": "<f4"}, "0.codes is float32"),
    "empty": ({}, "cannot be read: .* is missing"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_arrays_made_to_harm_are_refused_before_memory_is_taken(kind: str, checkpoint: Path) -> None:
    """Written with TensorStore in place of Orbax's, and realm.json made to agree."""
    changes, message = HOSTILE[kind]
    item = checkpoint / "weights" / "ffn_up.weight-Q8_0"
    fields = {"shape": [6, 16, 32, 256], "chunks": [6, 1, 32, 256], "compressor": None, "dtype": "|i1"} | changes
    metadata = {**fields, "fill_value": None, "filters": None, "order": "C"}
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{item}/", "path": "0.codes/"}}
    tensorstore.open(spec | {"metadata": metadata}, create=True, delete_existing=True).result()
    with open_gguf(checkpoint.parent / "model.gguf") as file:
        rows = listed(file.tensors)
    sums = json.loads((checkpoint / "realm.json").read_text())["crc32"]
    (checkpoint / "realm.json").unlink()
    write_manifest(checkpoint, MODEL, sums, {"tensors": rows})
    with pytest.raises(CheckpointError, match=message), open_model(checkpoint) as file:
        load_model(file, 64)


def test_a_shape_that_the_config_does_not_have_is_refused_as_in_a_file(checkpoint: Path) -> None:
    edit(checkpoint, double)
    with pytest.raises(GGUFError, match=r"attn_q\.weight has shape"), open_model(checkpoint) as file:
        load_model(file, 64)


# Writing


def test_what_is_there_already_is_kept(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    for target, message in (("file", "is no folder"), ("folder", "holds other things than a checkpoint")):
        for force in (False, True):
            with pytest.raises(CheckpointError, match=message):
                convert(made / "model.gguf", tmp_path / target, force=force)
    with pytest.raises(CheckpointError, match="already; force"):
        convert(made / "model.gguf", made / "model")
    with pytest.raises(GGUFError):
        convert(tmp_path / "file", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_checkpoint_is_replaced_and_leftovers_go(made: Path, checkpoint: Path) -> None:
    abandoned = checkpoint.with_name("model.partial-0123abcd")
    abandoned.mkdir()
    (abandoned / "x").write_text("x")
    cut_short(data_files(checkpoint)[0])
    convert(made / "model.gguf", checkpoint, force=True)
    assert sorted(os.listdir(checkpoint.parent)) == ["model", "model.gguf"]
    with open_model(checkpoint) as file:
        load_model(file, 64)
    empty = checkpoint.with_name("empty")
    empty.mkdir()
    convert(made / "model.gguf", empty)
    assert sorted(os.listdir(checkpoint.parent)) == ["empty", "model", "model.gguf"]


CONVERT = """
import os, signal, sys
from realm_jax.checkpoint import convert, folder
point = sys.argv[3]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    return lambda *arguments: (function(*arguments), die())

if point == "flushing":
    os.fsync = die
elif point == "replacing":
    folder._put_in_place = die
elif point == "replaced":
    folder._put_in_place = after(folder._put_in_place)
seen = []
def progress(what, done, total):
    seen.append(done)
    if point == str(len(seen)):
        die()
convert(sys.argv[1], sys.argv[2], force=True, progress=progress)
"""


POINTS = [("3", "new"), ("replaced", "old")]
SLOW_POINTS = [(point, which) for point in ("1", "flushing", "replacing", "replaced") for which in ("old", "new")]


@pytest.mark.parametrize(
    ("point", "which"), [*POINTS, *(pytest.param(*point, marks=pytest.mark.slow) for point in SLOW_POINTS)]
)
def test_kill_9_leaves_nothing_or_a_whole_one(point: str, which: str, made: Path, checkpoint: Path) -> None:
    target = {"old": checkpoint, "new": checkpoint.with_name("new")}[which]

    def found() -> int | None:
        return (target / "realm.json").stat().st_ino if target.exists() else None

    before = found()
    command = [sys.executable, "-c", CONVERT, made / "model.gguf", target, point]
    assert subprocess.run(command, check=False).returncode == -9
    if point == "replaced":
        assert found() not in (before, None)
    else:
        assert found() == before
        assert any(".partial-" in name for name in os.listdir(target.parent))
    if target.exists():
        with open_model(target) as file:
            load_model(file, 64)
    convert(made / "model.gguf", target, force=True)
    assert not any(".partial-" in name for name in os.listdir(target.parent))


def test_another_process_that_writes_is_left_alone(made: Path, tmp_path: Path) -> None:
    from realm_jax.checkpoint.folder import new_folder

    with new_folder(tmp_path / "model", replaces=lambda _: False) as mine:
        convert(made / "model.gguf", tmp_path / "model")
        assert mine.is_dir()
        shutil.rmtree(tmp_path / "model")
        (mine / "mine").write_text("x")
    assert os.listdir(tmp_path / "model") == ["mine"]


def test_no_space(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"no space: [0-9,]+ bytes are needed and 1,000 are free"):
        convert(made / "model.gguf", tmp_path / "a" / "model")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_meanwhile(made: Path, tmp_path: Path) -> None:
    """Files of at most 16 kB may be written, which fails as a full disk does, if with another number."""
    limited = ["bash", "-c", 'ulimit -f 16; exec "$0" "$@"', sys.executable, "-m", "realm_jax.cli"]
    command = [*limited, "convert", made / "model.gguf", tmp_path / "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


# The command line


def test_the_command_line(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def realm(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        return (code, *capfd.readouterr())

    target = tmp_path / "model"
    code, out, _ = realm("convert", made / "model.gguf", target, "--json")
    assert code == 0
    assert json.loads(out)["path"] == str(target)
    assert json.loads(out)["size"] == sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    code, _, err = realm("convert", made / "model.gguf", target)
    assert (code, err) == (2, f"error: there is a checkpoint in {target} already; force (--force) replaces it\n")
    code, _, err = realm("convert", target, tmp_path / "again")
    assert (code, err) == (2, f"error: {target} is a checkpoint already; accepted: a model in a GGUF file\n")
    assert realm("convert", made / "model.gguf", target, "--force")[0] == 0
    assert realm("tokenize", target, "the cat") == realm("tokenize", made / "model.gguf", "the cat")
    shown = [json.loads(realm("inspect", path, "--json")[1]) for path in (made / "model.gguf", target)]
    for key in ("architecture", "parameters", "types", "metadata", "tensors"):
        assert shown[0][key] == shown[1][key]
    assert (shown[1]["format"], shown[1]["version"]) == ("checkpoint", 1)
    flip(target / "header.gguf", 100)
    for command in (["inspect", target], ["tokenize", target, "x"], ["generate", target, "-p", "x"]):
        code, _, err = realm(*command)
        assert code == 2
        assert "is damaged: the file 'header.gguf' has other content" in err


def test_looking_at_one_does_not_import_jax(made: Path) -> None:
    code = (
        "import sys; from realm_jax.cli.app import run; run(['inspect', sys.argv[1]]); "
        "sys.exit('jax' in sys.modules or 'orbax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, made / "model"], check=True, stdout=subprocess.DEVNULL)


# States


def test_states(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": jax.numpy.ones((4,), jax.numpy.bfloat16)}
    facts = {"step": 3, "losses": [0.1, float("inf")], "nothing": None}
    save_state(tmp_path / "state", TRAINING, arrays, facts)
    with pytest.raises(CheckpointError, match="already; force"):
        save_state(tmp_path / "state", TRAINING, arrays, facts)
    found, said = load_state(tmp_path / "state", TRAINING)
    assert said == facts
    assert {name: (a.dtype, a.tobytes()) for name, a in found.items()} == {
        name: (a.dtype, np.asarray(a).tobytes()) for name, a in arrays.items()
    }
    with pytest.raises(CheckpointError, match="of the kind 'training state'; 'adapter' is accepted here"):
        load_state(tmp_path / "state", ADAPTER)
    with pytest.raises(CheckpointError, match="of the kind 'training state'; 'model' is accepted here"):
        LLM(tmp_path / "state")
    edit(tmp_path / "state", lambda f: f["arrays"].update(b=["float32", [2**40]]))
    with pytest.raises(CheckpointError, match=r"state has .* bytes, and its arrays need"):
        load_state(tmp_path / "state", TRAINING)
    with pytest.raises(CheckpointError, match=r"is no checkpoint: a folder with realm\.json is accepted"):
        load_state(tmp_path, TRAINING)
    with pytest.raises(ModelNotFoundError, match=r"holds no \.gguf file, and is no checkpoint"):
        LLM(tmp_path)


# Long ones


@pytest.mark.slow
def test_kill_9_at_any_time(made: Path, checkpoint: Path) -> None:
    """From while modules are imported to after the end."""
    command = [sys.executable, "-c", CONVERT, made / "model.gguf", checkpoint, "never"]
    begun = time.monotonic()
    subprocess.run(command, check=True)
    whole = time.monotonic() - begun
    for part in range(3, 13):
        process = subprocess.Popen(command)
        time.sleep(whole * part / 12)
        process.kill()
        process.wait()
        with open_model(checkpoint) as file:
            load_model(file, 64)
    convert(made / "model.gguf", checkpoint, force=True)
    assert sorted(os.listdir(checkpoint.parent)) == ["model", "model.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_loads_at_least_as_fast_as_the_file(backend: str, tmp_path: Path) -> None:
    """Of a quarter of the 1B shape, and in the processor's time: other processes take some of any other."""
    spec = tiny_models._llama(layers=4, width=2048, heads=32, kv_heads=8, hidden=8192)
    tiny_models.write_spec(spec, tmp_path / "model.gguf", label="fast", type_of=lambda _: "Q4_K")
    convert(tmp_path / "model.gguf", tmp_path / "model")
    seconds: dict[str, list[float]] = {"model.gguf": [], "model": []}
    for name in [*seconds] * 5:
        begun = time.process_time()
        with open_model(tmp_path / name) as file:
            load_model(file, 64, backend=backend)
        seconds[name].append(time.process_time() - begun)
    print(seconds)
    assert min(seconds["model"]) <= min(seconds["model.gguf"])
