"""The house of README.md: each floor imports only what lies below it, and some floors never see JAX."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"cli"},
    {"bench"},
    {"llm", "planning", "ray_serve"},
    {"engine"},
    {"arguments", "lora", "structured"},
    {"checkpoint"},
    {"sampling", "model"},
    {"cache", "quant", "text", "registry"},
    {"gguf", "results", "sampling_params", "sharding"},
    {"errors", "interrupt", "pallas_kernels"},
]
WITHOUT_JAX = {"cli", "text", "structured", "registry", "gguf", "results", "sampling_params", "errors"} | {
    "interrupt",
    "arguments",
}
FILES = sorted(
    path.relative_to(ROOT) for name in ("realm_jax", "pallas_kernels") for path in (ROOT / name).rglob("*.py")
)


def room(parts: tuple[str, ...]) -> str:
    """The part of the house a module's dotted name lies in."""
    return parts[1] if parts[0] == "realm_jax" and len(parts) > 1 else parts[0]


def imports(file: Path) -> Iterator[tuple[str, ...]]:
    """Every module a file imports, wherever in it."""
    parts = file.with_suffix("").parts
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = (*(parts[: -node.level] if node.level else ()), *(node.module or "").split("."))
            module = tuple(part for part in module if part)
            yield from ((*module, alias.name) for alias in node.names) if len(module) == 1 else [module]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down(file: Path) -> None:
    me = room(file.with_suffix("").parts)
    if me == "__init__":  # realm_jax's own front door, which opens lazily
        return
    [floor] = [i for i, rooms in enumerate(FLOORS) if me in rooms]
    below = set().union(*FLOORS[floor + 1 :])
    for module in imports(file):
        if module[0] in ("realm_jax", "pallas_kernels"):
            name = room(module)
            # "from realm_jax import LLM" names the door, not a room
            assert name in below or name == me or name[0].isupper(), f"{me} imports {'.'.join(module)}"
        assert me not in WITHOUT_JAX or module[0] not in ("jax", "flax"), f"{me} imports {module[0]}"


def test_every_room_has_a_floor() -> None:
    rooms = {room(file.with_suffix("").parts) for file in FILES}
    assert rooms - {"__init__"} == set().union(*FLOORS)
