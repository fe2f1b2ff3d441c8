"""Attention's Triton kernels, compiled by Triton where that is installed: no card is needed."""

from pathlib import Path

import pytest
from test_flash_attention import LOWERED, Case, exported
from triton_compiler import SHARED_MEMORY, compile_kernels

CARDS = {"NVIDIA A100-SXM4-80GB": 80, "NVIDIA GeForce RTX 4090": 89, "NVIDIA H100 80GB HBM3": 90}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("case", "dtype"), [*LOWERED, (Case(queries=1024, keys=1024), "bfloat16")])
def test_compiles_for_cards(case: Case, dtype: str, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory fits, and products are the tensor cores'."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = compile_kernels(exported(case, dtype, "gpu", "cuda", card), CARDS[card], tmp_path)
    assert sorted(kernels) == ["flash_attention_dkv", "flash_attention_dq", "flash_attention_forward"]
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= SHARED_MEMORY[CARDS[card]], name
        wide = CARDS[card] == 90 and dtype != "float32"
        assert ("wgmma.mma_async" if wide else "mma") in kernel.asm["ptx"], name
