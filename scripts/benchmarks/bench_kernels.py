"""bench_kernels: every kernel of pallas_kernels against the machine's limits and against XLA."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import machine, report
from .environment import fail
from .report import Row, note

OPERATIONS = ("quant_matmul", "paged_attention", "flash_attention", "grouped_lora")
QUICK_TYPES = ("Q4_K", "Q6_K", "Q8_0")
DESCRIPTION = """\
Times each kernel on the device JAX computes on: native kernels on a CPU, Pallas kernels on a GPU. A figure stands
beside the least time its bytes and operations can take here, by peaks measured in the same run, and beside XLA's time
for the same work (on a GPU also cuBLAS and cuDNN in bfloat16).
"""


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    import jax

    from . import accelerator, kernels

    begun = time.perf_counter()
    about: dict[str, Any] = machine.describe() | {"device": accelerator.describe()}
    platform = about["device"]["platform"]
    if platform not in ("cpu", "gpu"):
        fail(f"JAX computes on {platform}; accepted: a CPU or a GPU (JAX_PLATFORMS chooses)")
    rows: list[Row] = []
    settings = {
        "operations": arguments.only,
        "types": arguments.types,
        "rows": arguments.rows,
        "quick": arguments.quick,
    }
    cache = machine.last_level_cache()
    with machine.Meter(machine.threads(), 8 if arguments.tiny else max(256, min(4 * cache >> 20, 1024))) as meter:
        for _ in range(1 if arguments.tiny else 3):  # the limits of all rows are of these
            meter.measure()
        if platform == "cpu":
            from pallas_kernels import native

            if not native.available():
                note(f"{native.why_not()}: XLA's path is timed")
            sizes, peaks = kernels.cpu_sizes(cache, arguments.quick, native.available()), meter.peaks
        else:
            sizes, peaks = kernels.gpu_sizes(arguments.quick), accelerator.peaks()
        if arguments.tiny:
            sizes = kernels.tiny(sizes)
        for row in _rows(arguments, kernels, sizes, peaks):
            note(f"{row.name}: {report.number(row.figure)} {row.unit} {row.problem}")
            rows.append(row)
            report.write(arguments.json, "bench_kernels", rows, about, settings)
        meter.measure()  # was the machine still free?
    about |= {"peaks": vars(peaks), "busy": meter.busy}
    report.write(arguments.json, "bench_kernels", rows, about, settings)
    peak = ", ".join(f"{name} {report.number(value)}" for name, value in vars(peaks).items())
    print(f"{about['cpu']}, {about['threads']} threads; {about['device']['kind']}; jax {jax.__version__}")
    print(f"peaks measured here, 1e9 a second: {peak}; medians; {time.perf_counter() - begun:.0f} s in all")
    report.warn_if_busy(meter.busy)
    print("\n" + report.table(rows))
    return 0 if any(row.figure is not None for row in rows) else 1


def _rows(arguments: argparse.Namespace, kernels: Any, sizes: Any, peaks: machine.Peaks) -> Iterator[Row]:
    for operation in arguments.only:
        if operation == "quant_matmul":
            yield from kernels.matmul_rows(arguments.types, tuple(arguments.rows), sizes, peaks)
        elif operation == "paged_attention":
            yield from kernels.paged_rows(sizes, peaks)
        elif operation == "flash_attention":
            yield from kernels.flash_rows(sizes, peaks)
        else:
            yield from kernels.lora_rows(sizes, peaks)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_kernels", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(OPERATIONS), help="operations, with commas between")
    parser.add_argument("--types", help="of quant_matmul, with commas between; default: all quantized types")
    parser.add_argument("--rows", default="1,8,128", help="of x in quant_matmul; default: 1,8,128")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK_TYPES)} only, less memory, shorter")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the script itself")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    arguments = parser.parse_args(argv)
    from pallas_kernels.quant_matmul.formats import FORMATS

    quantized = [name for name, fmt in FORMATS.items() if not fmt.dense]
    default = QUICK_TYPES if arguments.quick else quantized
    arguments.types = _listed("--types", arguments.types, default, quantized)
    arguments.only = _listed("--only", arguments.only, OPERATIONS, OPERATIONS)
    try:
        arguments.rows = [int(count) for count in arguments.rows.split(",")]
    except ValueError:
        fail(f"--rows is {arguments.rows}; accepted: numbers with commas between")
    if min(arguments.rows) < 1:
        fail(f"--rows is {arguments.rows}; accepted: 1 and more")
    return arguments


def _listed(option: str, text: str | None, default: Any, accepted: Any) -> list[str]:
    if text is None:
        return list(default)
    names = text.split(",")
    unknown = [name for name in names if name not in accepted]
    if unknown:
        fail(f"{option} names {', '.join(unknown)}; accepted: {', '.join(accepted)}")
    return names
