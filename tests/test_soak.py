"""An engine under mixed traffic for a long time: memory stays flat and the books balance.

scripts/test -m slow tests/test_soak.py        REALM_SOAK_MINUTES says how long; 60 by default
"""

import asyncio
import os
import random
import time
from pathlib import Path

import pytest
from random_adapters import random_adapter
from tiny_models import tiny_spec, token_ids, write_spec

from realm_jax import Engine, Request, SamplingParams, Tenant
from realm_jax.errors import AdapterError
from realm_jax.lora import weight_shapes
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.model import load_model

MINUTES = float(os.environ.get("REALM_SOAK_MINUTES", "60"))
GROWTH = 32 << 20  # bytes, after the first quarter


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_an_hour_of_everything(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    write_spec(tiny_spec("llama"), model, label="llama")
    shapes = weight_shapes(load_model(model))
    adapters = []
    for seed in range(4):
        adapters.append(tmp_path / f"{seed}.gguf")
        write_gguf(random_adapter(shapes, 8, seed=seed), adapters[-1], 8.0)
    tenants = [Tenant("a", weight=3.0), Tenant("b", max_pages=20), Tenant("c", min_pages=2)]
    chance = random.Random(0)
    engine = Engine(
        model, context_length=512, max_batch=4, tenants=tenants, draft="ngram", ledger=tmp_path / "usage.db"
    )

    async def one() -> None:
        params = SamplingParams(
            max_tokens=chance.randint(1, 80),
            ignore_eos=True,
            temperature=chance.choice([0.0, 0.8]),
            presence_penalty=chance.choice([0.0, 0.5]),
        )
        request = Request(
            token_ids(chance.randint(1, 300)),
            params,
            tenant=chance.choice("abc"),
            adapter=chance.choice([None, None, "x", "y"]),
            deadline=chance.choice([None, None, None, 0.05]),
            cache=chance.random() < 0.8,
        )
        try:
            stream = engine.submit(request)
        except AdapterError:  # not loaded just now
            return
        async for _ in stream:
            if chance.random() < 0.01:
                await stream.aclose()

    async def adapting(until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(0.5)
            name = chance.choice("xy")
            if name in engine.stats().adapters and chance.random() < 0.5:
                engine.unload_adapter(name)
            else:
                engine.load_adapter(name, chance.choice(adapters))

    sizes = []

    async def main() -> None:
        until = time.monotonic() + 60 * MINUTES
        others = asyncio.create_task(adapting(until))
        while time.monotonic() < until:
            await asyncio.gather(*(one() for _ in range(24)))
            sizes.append(resident_bytes())
        await others

    asyncio.run(main())
    for _ in range(500):
        stats = engine.stats()
        if not stats.running and not stats.waiting:
            break
        time.sleep(0.01)
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    assert not engine._live
    engine.close()
    early, late = max(sizes[: len(sizes) // 4]), max(sizes[-len(sizes) // 4 :])
    print(f"{len(sizes)} rounds, {stats.generated_tokens} tokens, {early >> 20} MB early, {late >> 20} MB late")
    assert late - early < GROWTH
