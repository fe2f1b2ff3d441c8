"""The steps of gpu_check, each in a process of its own: rows as JSON, one a line, as soon as they are known.

python -m benchmarks.gpu_steps STEP [--dry-run] [--peaks JSON]
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .environment import ROOT
from .machine import Peaks, median
from .report import Row

DECODE_BAR = 450.0  # tokens a second of an 8B-shaped Q4_K_M at batch 1, on an H200
BATCH_BAR = 8.0  # times as many at batch 16
DECODED, PROMPT, PREFILL = 48, 64, 1024
BATCHES = (1, 16)


def info(dry: bool, peaks: Peaks) -> Iterator[dict[str, Any]]:
    """What JAX computes on."""
    from . import accelerator, machine, report

    found = machine.describe() | {"device": accelerator.describe(), "versions": report.versions()}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        found["nvidia_smi"] = done.stdout.strip() if done.returncode == 0 else done.stderr.strip()[:300]
    except OSError:
        found["nvidia_smi"] = "not installed"
    yield {"machine": found}


def ceilings(dry: bool, peaks: Peaks) -> Iterator[Any]:
    """Copy bandwidth and the rate of a large bfloat16 product: the limits of all that follows."""
    from . import accelerator

    measured = accelerator.peaks(tiny=dry)
    yield {"peaks": vars(measured)}
    yield Row("memory bandwidth, read and written", measured.read, "GB/s")
    yield Row("XLA's bf16 product of large squares", (measured.float32 or 0.0) * 1e-3, "TFLOP/s")


def checks(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """Kernels on the device against their references."""
    from .checks import all_checks

    yield from all_checks("interpret" if dry else "gpu", dry)


def matvec(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """Quantized matrix times 1 to 8 vectors; bar: 70 % of bandwidth."""
    from . import kernels

    sizes = kernels.dry_sizes() if dry else kernels.gpu_sizes(quick=True)
    counts = (1, 3) if dry else (1, 2, 4, 8)
    for row in kernels.matmul_rows(["Q8_0", "Q6_K", "Q4_K"], counts, sizes, peaks):
        yield _barred(row, row.of_limit, 0.7, "of the limit")


def prefill_matmul(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """Quantized matrix times many vectors; bar: 70 % of cuBLAS in bfloat16."""
    from . import kernels

    sizes = kernels.dry_sizes() if dry else kernels.gpu_sizes(quick=True)
    for row in kernels.matmul_rows(["Q4_K", "Q8_0", "Q6_K"], (20,) if dry else (512, 2048), sizes, peaks):
        yield _barred(row, row.ratio, 0.7, "of cuBLAS")


def flash(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """Flash attention; bars: 80 % of cuDNN forward, 60 % backward."""
    from . import kernels

    sizes = kernels.dry_sizes() if dry else kernels.gpu_sizes(quick=False)
    for row in kernels.flash_rows(sizes, peaks):
        yield _barred(row, row.ratio, 0.6 if "backward" in row.name else 0.8, "of cuDNN")


def paged(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """Paged attention and adapters."""
    from . import kernels

    sizes = kernels.dry_sizes() if dry else kernels.gpu_sizes(quick=True)
    yield from kernels.paged_rows(sizes, peaks)
    yield from kernels.lora_rows(sizes, peaks)


def model_q4(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """An 8B-shaped Q4_K_M: decode and prefill."""
    yield from _model("Q4_K_M", dry, peaks)


def model_q8(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """An 8B-shaped Q8_0: decode and prefill."""
    yield from _model("Q8_0", dry, peaks)


def _model(mixture: str, dry: bool, peaks: Peaks) -> Iterator[Row]:
    from .random_model import Steps, random_model, read_bytes
    from .shapes import SHAPES

    shape = SHAPES["least" if dry else "8b"]
    batches = (1, 2) if dry else BATCHES
    decoded, prompt, prefill = (1, 1, 16) if dry else (DECODED, PROMPT, PREFILL)
    model = random_model(shape, mixture, "interpret" if dry else "gpu", min(shape.context, 4096))
    steps, bytes = Steps(model, max(batches)), read_bytes(model)
    repeats = 1 if dry else 3
    single = 0.0
    for batch in batches:
        if not dry:
            steps.decode(batch, 2, prompt)  # compiles
        samples = [batch * decoded / steps.decode(batch, decoded, prompt) for _ in range(repeats)]
        limit = batch / (bytes / peaks.read * 1e-9) if peaks.read else None
        row = Row(f"{_shape_name(dry)} {mixture}: decode {batch}", median(samples), "tokens/s", limit, samples=samples)
        row.rate = f"{median(samples) / batch * bytes * 1e-9:.4g} GB/s"
        if batch == 1:
            single = median(samples)
            yield _barred(row, single / DECODE_BAR, 1.0, f"of {DECODE_BAR:.0f}") if mixture == "Q4_K_M" else row
        else:
            yield _barred(row, median(samples) / single, BATCH_BAR, "times batch 1")
    if not dry:
        steps.prefill(prefill)
    samples = [prefill / steps.prefill(prefill) for _ in range(repeats)]
    elements = sum(n * k for _, n, k in shape.matrices()) * shape.layers
    limit = 1 / (2 * elements / peaks.float32 * 1e-9) if peaks.float32 else None
    yield Row(f"{_shape_name(dry)} {mixture}: prefill {prefill}", median(samples), "tokens/s", limit, samples=samples)


def _shape_name(dry: bool) -> str:
    return "least" if dry else "8B"


def launch(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """A 1B-shaped Q4_K through the launch script, with one process: its figures are LLM()'s, host loop and all."""
    from .model_files import write_model
    from .shapes import SHAPES

    shape = "tiny" if dry else "1b"
    with tempfile.TemporaryDirectory(prefix="realm-launch-") as folder:
        path = Path(folder) / f"{shape}-Q4_K.gguf"
        write_model(path, SHAPES[shape], "Q4_K")
        script = [sys.executable, str(ROOT / "scripts" / "launch_sharded.py"), "--processes", "1"]
        done = subprocess.run([*script, "bench", str(path), "--json"], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            yield Row(f"launch_sharded.py, {shape} Q4_K", None, "tokens/s", problem=said[:300], ok=False)
            return
        figures, size = json.loads(done.stdout), path.stat().st_size
    for key in ("prefill_256", "decode_1", "decode_8"):
        limit = peaks.read * 1e9 / size if peaks.read and key == "decode_1" else None
        yield Row(f"launch_sharded.py, {shape} Q4_K: {key}", figures[key], "tokens/s", limit)


def transformers(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """The same shape in Hugging Face transformers, bfloat16, on the same card."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            yield Row("transformers bf16", None, "tokens/s", problem=f"{package} is not installed")
            return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from .shapes import SHAPES

    shape = SHAPES["least" if dry else "8b"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not dry:
        yield Row("transformers bf16", None, "tokens/s", problem="torch sees no GPU")
        return
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def decode(batch: int, steps: int) -> float:
        ids = torch.randint(0, shape.vocabulary, (batch, PROMPT), device=device)
        state = model(ids, use_cache=True)
        token = state.logits[:, -1:].argmax(-1)
        wait()
        begun = time.perf_counter()
        for _ in range(steps):
            state = model(token, past_key_values=state.past_key_values, use_cache=True)
            token = state.logits[:, -1:].argmax(-1)
            token.tolist()  # through the host, as an engine's
        wait()
        return time.perf_counter() - begun

    def prefill(tokens: int) -> float:
        ids = torch.randint(0, shape.vocabulary, (1, tokens), device=device)
        wait()
        begun = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        wait()
        return time.perf_counter() - begun

    repeats, steps = (1, 2) if dry else (3, DECODED)
    with torch.inference_mode():
        for batch in (1, 2) if dry else BATCHES:
            decode(batch, 2)
            samples = [batch * steps / decode(batch, steps) for _ in range(repeats)]
            yield Row(f"transformers bf16: decode {batch}", median(samples), "tokens/s", samples=samples)
        tokens = 32 if dry else PREFILL
        prefill(tokens)
        samples = [tokens / prefill(tokens) for _ in range(repeats)]
        yield Row(f"transformers bf16: prefill {tokens}", median(samples), "tokens/s", samples=samples)


def build(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """The native CPU kernels, where they are not built yet."""
    library = ROOT / "pallas_kernels" / "native" / "realm_native.so"
    if library.exists() or dry:
        there = "already built" if library.exists() else "left out of a dry run"
        yield Row("native CPU kernels", None, "s", problem=there)
        return
    begun = time.perf_counter()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    text = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if library.exists():
        yield Row("native CPU kernels, built", time.perf_counter() - begun, "s", higher=False)
    else:
        yield Row("native CPU kernels, built", None, "s", problem=text[:300], ok=False)


def tests(dry: bool, peaks: Peaks) -> Iterator[Row]:
    """The kernels' own tests, on the device."""
    names = ("quant_matmul", "paged_attention", "flash_attention", "grouped_lora")
    files = [f"tests/test_{name}.py" for name in names if (ROOT / "tests" / f"test_{name}.py").exists()]
    if importlib.util.find_spec("pytest") is None:
        yield Row("tests of the kernels", None, "passed", problem="pytest is not installed", ok=False)
        return
    # Each file for itself: what one has run of the time is not lost with the next.
    for file in files:
        options = ["--collect-only"] if dry else []
        command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *options, file]
        environment = os.environ | ({} if dry else {"JAX_PLATFORMS": "cuda,cpu"})
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        line = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"])[-1]
        failed = [text for text in done.stdout.splitlines() if text.startswith("FAILED")]
        note = "; ".join([line, *failed[:3]])[:400]
        yield Row(f"tests: {Path(file).name}", float(done.returncode == 0), "passed", rate=note, ok=not done.returncode)


# In the order in which they run, with the seconds each may take.
STEPS: dict[str, tuple[Callable[[bool, Peaks], Iterator[Any]], int]] = {
    "info": (info, 60),
    "ceilings": (ceilings, 60),
    "checks": (checks, 100),
    "matvec": (matvec, 110),
    "model-q4": (model_q4, 100),
    "flash": (flash, 60),
    "prefill": (prefill_matmul, 60),
    "model-q8": (model_q8, 80),
    "launch": (launch, 90),
    "transformers": (transformers, 70),
    "paged": (paged, 60),
    "build": (build, 120),
    "tests": (tests, 120),
}


def _barred(row: Row, reached: float | None, bar: float, of: str) -> Row:
    """The row, with whether it reaches its bar."""
    if reached is not None:
        row.ok = reached >= bar
        row.rate = f"{row.rate}; bar {bar:g} {of}, {reached:.2f} reached".lstrip("; ")
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--peaks", default="{}")
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peaks = Peaks(**{"read": None} | json.loads(arguments.peaks))
    for entry in STEPS[arguments.step][0](arguments.dry_run, peaks):
        said = {"row": entry.as_dict()} if isinstance(entry, Row) else entry
        out.write(json.dumps(said) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
