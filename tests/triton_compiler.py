"""Triton's own compiler, where it is installed, on the Pallas kernels of a program lowered for a card."""

import re
from pathlib import Path
from typing import Any

import pytest

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a program may have


def kernels(text: str) -> list[tuple[str, bytes, dict[str, int]]]:
    """(name, Triton's intermediate code, warps and stages) of every Triton kernel of a lowered program."""
    found = []
    for line in text.splitlines():
        if "@__gpu$xla.gpu.triton" in line:
            escaped = re.search(r'ir = "((?:[^"\\]|\\.)*)"', line)[1]
            code = re.sub(r"\\([0-9A-F]{2}|.)", lambda m: chr(int(m[1], 16)) if len(m[1]) == 2 else m[1], escaped)
            sizes = {name: int(re.search(rf"{name} = (\d+)", line)[1]) for name in ("num_warps", "num_stages")}
            found.append((re.search(r'name = "(\w+)"', line)[1], code.encode("latin1"), sizes))
    return found


def compile_kernels(text: str, capability: int, folder: Path) -> dict[str, Any]:
    """Kernels of a lowered program by name, compiled: .metadata.shared is in bytes, .asm["ptx"] the code."""
    triton = pytest.importorskip("triton")
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    target = GPUTarget("cuda", capability, 32)
    backend = CUDABackend(target)
    compiled = {}
    for name, code, sizes in kernels(text):
        path = folder / f"{name}.ttir"
        path.write_bytes(code)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        module = ir.parse_mlir_module(str(path), context)
        module.context = context
        path.write_text(str(backend.make_ttir(module, {}, backend.parse_options(sizes), capability)))
        compiled[name] = triton.compile(str(path), target=target, options=sizes)
    return compiled
