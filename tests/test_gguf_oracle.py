"""The GGUF reader beside ggml's own C reader: the same type table, the same verdict on damaged files."""

import ctypes
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_gguf_fuzz import mutate, seeds

from realm_jax.errors import GGUFError
from realm_jax.gguf import GGMLType, open_gguf

pytestmark = pytest.mark.oracle

CASES = 5000

# Where this reader refuses and ggml does not: ggml looks at where data end only when it reads them, takes names as C
# strings, lets dimensions be 0 and reads every byte but 0 as true.
STRICTER = [
    "would end at byte",
    "is not UTF-8",
    "holds a NUL character",
    "dimensions of at least 1",
    "the tensor name has a length of 0 bytes",
    "0 and 1 are accepted",
]
# Where ggml refuses and this reader does not: tensors with gaps between them, or in another order than their data.
LOOSER = "has offset"


class InitParams(ctypes.Structure):
    """struct gguf_init_params of gguf.h."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    llama_cpp = pytest.importorskip("llama_cpp")
    found = sorted(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.*"))
    assert found, "llama-cpp-python carries libggml-base"
    library = ctypes.CDLL(str(found[0]))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, InitParams]
    library.gguf_free.argtypes = [ctypes.c_void_p]
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_log_set.argtypes = [LOG_CALLBACK, ctypes.c_void_p]
    return library


@pytest.fixture
def ggml_log(ggml: ctypes.CDLL) -> Iterator[list[str]]:
    lines: list[str] = []
    callback = LOG_CALLBACK(lambda level, text, data: lines.append(text.decode("utf-8", "replace")))
    ggml.ggml_log_set(callback, None)
    yield lines
    ggml.ggml_log_set(LOG_CALLBACK(), None)


@pytest.mark.parametrize("kind", list(GGMLType), ids=lambda kind: kind.name)
def test_type_is_ggmls(ggml: ctypes.CDLL, kind: GGMLType) -> None:
    assert ggml.ggml_type_name(int(kind)).decode().lower() == kind.name.lower()
    assert (ggml.ggml_blck_size(int(kind)), ggml.ggml_type_size(int(kind))) == (kind.block_size, kind.type_size)


def verdict(path: Path) -> str | None:
    """This reader's complaint, or None if it opens the file."""
    try:
        open_gguf(path).close()
    except GGUFError as error:
        return str(error)
    return None


def test_same_verdict_on_damaged_files(ggml: ctypes.CDLL, ggml_log: list[str], tmp_path: Path) -> None:
    rng = random.Random(5)
    path = tmp_path / "m.gguf"
    whole = seeds()[:3]  # not the split ones: ggml's reader knows nothing of parts
    verdicts = {True: 0, False: 0}
    for _ in range(CASES):
        path.write_bytes(mutate(rng.choice(whole), rng))
        ggml_log.clear()
        context = ggml.gguf_init_from_file(str(path).encode(), InitParams(True, None))
        ggml.gguf_free(context)
        complaint = "".join(ggml_log)
        verdicts[bool(context)] += 1
        ours = verdict(path)
        if ours is None:
            assert context or LOOSER in complaint, complaint
        else:
            assert not context or any(reason in ours for reason in STRICTER), ours
    assert min(verdicts.values()) > CASES // 10
