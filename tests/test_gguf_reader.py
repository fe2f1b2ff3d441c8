"""The GGUF reader on valid files: values, tensors, splits, views, release, agreement with gguf-py, speed, summary."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gguf
import gguf_writer as w
import numpy as np
import pytest

from realm_jax.errors import GGUFError
from realm_jax.gguf import GGMLType, describe, open_gguf

# Elements and bytes of a block, from the structures in ggml-common.h.
BLOCKS = """F32 1 4, F16 1 2, BF16 1 2, F64 1 8, I8 1 1, I16 1 2, I32 1 4, I64 1 8,
Q4_0 32 18, Q4_1 32 20, Q5_0 32 22, Q5_1 32 24, Q8_0 32 34, Q8_1 32 36,
Q2_K 256 84, Q3_K 256 110, Q4_K 256 144, Q5_K 256 176, Q6_K 256 210, Q8_K 256 292,
IQ1_S 256 50, IQ1_M 256 56, IQ2_XXS 256 66, IQ2_XS 256 74, IQ2_S 256 82, IQ3_XXS 256 98, IQ3_S 256 110,
IQ4_NL 32 18, IQ4_XS 256 136, TQ1_0 256 54, TQ2_0 256 66, MXFP4 32 17, NVFP4 64 36, Q1_0 128 18, Q2_0 64 18"""

# gguf-py 0.19 still has Q8_1 with two float32 in front of its codes (40 bytes); ggml's C has two float16 (36).
PEER_TYPES = {kind: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items() if kind.name != "Q8_1"}


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    path = tmp_path / "rich.gguf"
    path.write_bytes(w.rich_file())
    return path


def test_type_table_has_every_type_of_ggml() -> None:
    expected = {name: (int(block), int(size)) for name, block, size in map(str.split, BLOCKS.split(","))}
    assert {t.name: (t.block_size, t.type_size) for t in GGMLType} == expected


def test_type_table_agrees_with_gguf_py() -> None:
    for kind, (block, size) in PEER_TYPES.items():
        ours = GGMLType(int(kind))
        assert (ours.name, ours.block_size, ours.type_size) == (kind.name, block, size)


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_value(tmp_path: Path, version: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(w.rich_file(version))
    with open_gguf(path) as file:
        assert file.version == version
        assert file.parts == (path,)
        assert file.nbytes == path.stat().st_size
        m = dict(file.metadata)
    scalars = {k: v for k, v in m.items() if not isinstance(v, list | np.ndarray)}
    assert scalars == {
        "general.architecture": "llama",
        "general.name": "tiny \N{HOT BEVERAGE}",
        "general.alignment": 64,
        "x.u8": 255,
        "x.i8": -128,
        "x.u16": 65535,
        "x.i16": -32768,
        "x.u32": 2**32 - 1,
        "x.i32": -(2**31),
        "x.f32": 1.5,
        "x.bool": True,
        "x.u64": 2**64 - 1,
        "x.i64": -(2**63),
        "x.f64": 0.1,
        "x.empty": "",
    }
    assert {type(v) for v in scalars.values()} == {str, int, float, bool}
    assert m["tokenizer.ggml.tokens"] == ["<s>", "", "\u2581the", "a\nb", "\N{HOT BEVERAGE}"]
    assert m["x.a.no_strings"] == []
    arrays = {k: (v.dtype.name, v.tolist()) for k, v in m.items() if isinstance(v, np.ndarray)}
    assert arrays == {
        "x.a.u8": ("uint8", [0, 1, 255]),
        "x.a.i16": ("int16", [-1, 2]),
        "x.a.u32": ("uint32", list(range(40))),
        "x.a.f32": ("float32", [0.5, -0.25]),
        "x.a.bool": ("bool", [True, False, True]),
        "x.a.i64": ("int64", [-(2**63), 2**63 - 1]),
        "x.a.none": ("int32", []),
    }
    with pytest.raises(ValueError, match="read-only"):
        m["x.a.u8"][0] = 1


def test_tensors_are_described_outermost_dimension_first(rich: Path) -> None:
    with open_gguf(rich) as file:
        described = [(t.name, t.shape, t.type.name, t.nbytes, t.elements) for t in file.tensors.values()]
    assert described == [
        ("token_embd.weight", (5, 64), "Q8_0", 340, 320),
        ("norm.weight", (64,), "F32", 256, 64),
        ("blk.0.w", (3, 2, 256), "Q4_K", 864, 1536),
        ("blk.0.scale", (), "F32", 4, 1),
        ("blk.0.e", (2, 2, 1, 3), "BF16", 24, 12),
    ]


def test_data_is_a_read_only_view_of_the_file(rich: Path) -> None:
    raw = rich.read_bytes()
    with open_gguf(rich) as file:
        views = {name: file.data(name) for name in file.tensors}
        for name, view in views.items():
            info = file.tensors[name]
            assert (view.dtype, view.shape, view.flags.owndata) == (np.uint8, (info.nbytes,), False)
            assert info.offset % 64 == 0
            assert view.tobytes() == raw[info.offset : info.offset + info.nbytes]
        with pytest.raises(ValueError, match="read-only"):
            views["norm.weight"][0] = 1
        with pytest.raises(ValueError, match=r"WRITEABLE|writeable"):
            views["norm.weight"].flags.writeable = True
    # A view outlives the file; the file itself is closed.
    assert views["norm.weight"].tobytes() in raw
    with pytest.raises(ValueError, match="closed"):
        file.data("norm.weight")
    file.close()  # twice is harmless


def test_text_that_is_no_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tokens = w.string("t") + w.u32(w.ARRAY) + w.u32(w.STRING) + w.u64(2) + w.string(b"\xff\xc3") + w.string("ok")
    path.write_bytes(w.gguf([tokens, w.key("general.name", w.STRING, w.string(b"a\xf0b"))]))
    with open_gguf(path) as file:
        assert file.metadata["t"] == ["\udcff\udcc3", "ok"]
        assert file.metadata["t"][0].encode("utf-8", "surrogateescape") == b"\xff\xc3"
        assert describe(file)["name"] == "a\ufffdb"


def test_a_vocabulary_only_file_has_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    path.write_bytes(w.gguf([w.key("general.architecture", w.STRING, "llama")]))
    with open_gguf(str(path)) as file:
        assert (len(file.tensors), file.metadata["general.architecture"]) == (0, "llama")


def test_gaps_any_order_and_missing_final_padding_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = bytes(range(16)) + bytes(112) + bytes(range(100, 116))
    path.write_bytes(w.gguf([], [w.tensor("late", (4,), 0, 128), w.tensor("early", (4,), 0, 0)], data))
    with open_gguf(path) as file:
        assert list(file.tensors) == ["late", "early"]
        assert file.data("late").tobytes() == bytes(range(100, 116))
        assert file.data("early").tobytes() == bytes(range(16))


@pytest.mark.parametrize("alignment", [1, 8, 4096])
def test_alignment_is_the_files_own(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "m.gguf"
    keys = [w.key("general.alignment", w.U32, alignment)]
    path.write_bytes(w.gguf(keys, [w.tensor("t", (4,), 24, 0)], b"abcd", alignment=alignment))
    with open_gguf(path) as file:
        assert file.data("t").tobytes() == b"abcd"


def write_with_gguf_py(path: Path) -> None:
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("peer")
    writer.add_block_count(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_add_bos_token(True)
    writer.add_token_list(["<unk>", "\u2581a", "\N{HOT BEVERAGE}", "x" * 300])
    writer.add_token_scores([0.0, -1.0, -2.5, -3.0])
    writer.add_token_types([2, 1, 1, 1])
    writer.add_array("x.flags", [True, False])
    for number, (kind, (block, size)) in enumerate(PEER_TYPES.items()):
        rows = rng.integers(0, 256, (3, 2, 2 * size), np.uint8)
        shape = (3, 2, 2 * block)
        if kind.name in ("F32", "F16", "F64", "I8", "I16", "I32", "I64"):
            dtype = {"F": "float", "I": "int"}[kind.name[0]] + kind.name[1:]
            writer.add_tensor(f"t.{number}", rows.view(dtype))
        else:
            writer.add_tensor(f"t.{number}", rows, raw_shape=rows.shape, raw_dtype=kind)
            assert gguf.quant_shape_from_byte_shape(rows.shape, kind) == shape
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_equal_to_gguf_py_on_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "peer.gguf"
    write_with_gguf_py(path)
    peer = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        fields = {k: f.contents() for k, f in peer.fields.items() if not k.startswith("GGUF.")}
        ours = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.metadata.items()}
        assert ours == fields
        assert len(file.tensors) == len(peer.tensors) == len(PEER_TYPES)
        for mine, theirs in zip(file.tensors.values(), peer.tensors, strict=True):
            assert mine.name == theirs.name
            assert mine.type == int(theirs.tensor_type)
            assert mine.shape == tuple(int(d) for d in reversed(theirs.shape))
            assert mine.nbytes == theirs.n_bytes
            assert file.data(mine.name).tobytes() == theirs.data.tobytes()


# -- split files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_part_opens_the_whole_split_file(tmp_path: Path, named: int) -> None:
    files = w.split_files("model-q4", 3)
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    paths = [tmp_path / name for name in files]
    with open_gguf(paths[named]) as file:
        assert (file.path, file.parts) == (paths[named], tuple(paths))
        assert file.nbytes == sum(len(raw) for raw in files.values())
        assert file.metadata["general.architecture"] == "llama"
        assert list(file.tensors) == ["t.0.0", "t.1.0", "t.1.1", "t.2.0", "t.2.1", "t.2.2"]
        for name, info in file.tensors.items():
            n, i = int(name[2]), int(name[4])
            assert info.part == n
            assert file.data(name).view("<f4").tolist() == np.full(8, n + i / 100, "<f4").tolist()
            file.release(name)


def test_split_written_by_gguf_py(tmp_path: Path) -> None:
    path = tmp_path / "peer.gguf"
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t.{i}", np.full(8, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "peer-00002-of-00003.gguf") as file:
        assert len(file.parts) == 3
        assert [file.data(f"t.{i}").view("<f4")[0] for i in range(5)] == [0, 1, 2, 3, 4]


def test_a_merged_file_that_says_zero_parts_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(w.gguf([w.key("split.no", w.U16, 0), w.key("split.count", w.U16, 0)]))
    with open_gguf(path) as file:
        assert len(file.parts) == 1


# -- memory ------------------------------------------------------------------------------------------------------------


def resident_file_pages(path: Path) -> int:
    """Bytes of this file's mapping that are resident in this process."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_release_drops_resident_pages_and_data_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    size = 1 << 24
    data = np.arange(2 * size // 4, dtype="<u4").tobytes()
    path.write_bytes(w.gguf([], [w.tensor("a", (size,), 24, 0), w.tensor("b", (size,), 24, size)], data))
    with open_gguf(path) as file:
        view = file.data("a")
        total = int(view.view("<u4").sum(dtype=np.uint64))
        assert resident_file_pages(path) >= size
        file.release("a")
        assert resident_file_pages(path) <= 65536
        assert int(view.view("<u4").sum(dtype=np.uint64)) == total
    file.release("a")  # harmless once closed


def test_a_file_cut_short_after_opening_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(w.gguf([], [w.tensor("a", (1024,), 0, 0), w.tensor("b", (1024,), 0, 4096)], bytes(8192)))
    with open_gguf(path) as file:
        os.truncate(path, path.stat().st_size - 4096)
        assert file.data("a").sum() == 0
        with pytest.raises(GGUFError, match=r"tensor 'b' ends at byte \d+, but the file has been cut to \d+ bytes"):
            file.data("b")


def test_closing_gives_the_descriptors_back(rich: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs Linux's /proc")
    bad = rich.with_name("bad.gguf")
    bad.write_bytes(w.rich_file()[:-500])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with open_gguf(rich) as file:
            file.data("norm.weight")
        with pytest.raises(GGUFError):
            open_gguf(bad)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_unknown_tensor_is_named(rich: Path) -> None:
    with open_gguf(rich) as file, pytest.raises(GGUFError, match=r"there is no tensor 'output\\n.weight'"):
        file.data("output\n.weight")


# -- speed, imports, summary -------------------------------------------------------------------------------------------


def test_a_vocabulary_of_262144_entries_reads_quickly(tmp_path: Path) -> None:
    """Generous against a busy machine; it prints the time. gguf-py takes tens of seconds."""
    tokens, merges = 262_144, 514_906
    path = tmp_path / "vocab.gguf"
    keys = [
        w.array("tokenizer.ggml.tokens", w.STRING, [f"\u2581token{i}" for i in range(tokens)]),
        w.string("tokenizer.ggml.scores") + w.u32(w.ARRAY) + w.u32(w.F32) + w.u64(tokens) + bytes(4 * tokens),
        w.string("tokenizer.ggml.token_type") + w.u32(w.ARRAY) + w.u32(w.I32) + w.u64(tokens) + bytes(4 * tokens),
        w.array("tokenizer.ggml.merges", w.STRING, [f"\u2581tok en{i}" for i in range(merges)]),
    ]
    path.write_bytes(w.gguf(keys))
    started = time.perf_counter()
    with open_gguf(path) as file:
        seconds = time.perf_counter() - started
        print(f"{tokens} tokens and {merges} merges: {seconds:.3f} s")
        assert seconds < 5
        assert file.metadata["tokenizer.ggml.tokens"][-1] == f"\u2581token{tokens - 1}"
        assert file.metadata["tokenizer.ggml.merges"][-1] == f"\u2581tok en{merges - 1}"


def test_reading_does_not_import_jax(rich: Path) -> None:
    code = (
        "import sys; from realm_jax.gguf import open_gguf; open_gguf(sys.argv[1]).close(); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, rich], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_describe_is_json_and_abbreviates_long_arrays(rich: Path) -> None:
    with open_gguf(rich) as file:
        told = json.loads(json.dumps(describe(file), allow_nan=False))
    assert told["path"] == str(rich)
    assert (told["version"], told["size"], told["tensor_count"]) == (3, rich.stat().st_size, 5)
    assert (told["architecture"], told["name"]) == ("llama", "tiny \N{HOT BEVERAGE}")
    assert told["parameters"] == 320 + 64 + 1536 + 1 + 12
    assert list(told["types"].items()) == [
        ("Q4_K", {"tensors": 1, "bytes": 864}),
        ("Q8_0", {"tensors": 1, "bytes": 340}),
        ("F32", {"tensors": 2, "bytes": 260}),
        ("BF16", {"tensors": 1, "bytes": 24}),
    ]
    assert told["metadata"]["x.a.u32"] == {"type": "uint32", "length": 40, "first": list(range(16))}
    assert told["metadata"]["x.a.bool"] == [True, False, True]
    assert told["tensors"][2] == {"name": "blk.0.w", "shape": [3, 2, 256], "type": "Q4_K", "bytes": 864}


def test_describe_writes_floats_that_are_not_finite_as_text(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(
        w.gguf(
            [w.key("a", w.F32, float("nan")), w.array("b", w.F64, [1.0, float("-inf")]), w.key("general.name", w.U8, 1)]
        )
    )
    with open_gguf(path) as file:
        told = json.loads(json.dumps(describe(file), allow_nan=False))
    assert told["metadata"] == {"a": "nan", "b": [1.0, "-inf"], "general.name": 1}
    assert told["name"] is None
