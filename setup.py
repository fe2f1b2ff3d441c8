"""Builds the native CPU kernels when there is a C++ compiler; without one the package installs all the same.

Everything else about the package is in pyproject.toml. Sources lie in pallas_kernels/native and
pallas_kernels/*/native. A file named *_isa.cc is compiled once for each instruction set below, with REALM_ISA as the
namespace of what it defines; the others once, for the baseline processor, so that the library loads anywhere.
CXX and CXXFLAGS are honoured (an address sanitizer build: CXXFLAGS="-fsanitize=address -g").
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FOLDERS = ("pallas_kernels/native", "pallas_kernels/*/native")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
ISAS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]


class BuildNative(build_ext):
    """Compiles with the plain compiler driver: the kernels need neither Python's headers nor its flags."""

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{ROOT / 'pallas_kernels/native'}", f"-isystem{ROOT / 'pallas_kernels/native/third_party'}"]
        jobs = []
        for source in ext.sources:
            name = source.replace(os.sep, "_").removesuffix(".cc")
            variants = ISAS if source.endswith("_isa.cc") else {"": []}
            for isa, flags in variants.items():
                object_file = build / f"{name}_{isa}.o"
                defines = [f"-DREALM_ISA={isa}", f"-DREALM_ISA_{isa.upper()}"] if isa else []
                command = [*compiler, *FLAGS, *flags, *extra, *defines, *include, "-c", source, "-o", str(object_file)]
                jobs.append((command, object_file))
        headers = [p for folder in FOLDERS for p in ROOT.glob(f"{folder}/*.h")]
        newest = max(p.stat().st_mtime for p in (*headers, ROOT / "setup.py"))
        linker = [*compiler, "-shared", *extra, *(str(o) for _, o in jobs), "-o", str(target)]
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda job: compile_if_older(*job, newest, extra), jobs))
            run(linker)
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"warning: the native CPU kernels were not built ({error}); Realm will use XLA instead", file=sys.stderr
            )
            target.unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # one name for every Python: it is not an extension module

    def copy_extensions_to_source(self) -> None:  # as setuptools', for one that may not have been built
        for ext in self.extensions:
            built, inplace = (
                Path(self.build_lib) / self.get_ext_filename(ext.name),
                ROOT / self.get_ext_filename(ext.name),
            )
            if built.exists():
                self.copy_file(str(built), str(inplace))


def compile_if_older(command: list[str], target: Path, newest_header: float, extra: list[str]) -> None:
    source = ROOT / command[command.index("-c") + 1]
    if not extra and target.exists() and target.stat().st_mtime > max(newest_header, source.stat().st_mtime):
        return
    run(command)


def run(command: list[str]) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


sources = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.cc"))
setup(
    ext_modules=[Extension("pallas_kernels.native.realm_native", sources, optional=True)],
    cmdclass={"build_ext": BuildNative},
)
