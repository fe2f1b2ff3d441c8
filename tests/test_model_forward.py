"""The forward through the runner: pages, chunks, batches and programs."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from realm_jax.engine.programs import run_batch
from realm_jax.engine.runner import Runner
from realm_jax.errors import BackendError
from realm_jax.model import load_model
from realm_jax.model.backend import resolve_backend

# Plain, experts, windows with soft-caps, sinks, latent attention.
CASES = ["llama", "llama-moe", "gemma2", "gpt-oss", "deepseek2"]
SOME = [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder: Path = tmp_path_factory.mktemp("models")
    loaded = {}
    for case in CASES:
        tiny_models.write_tiny_model(case, folder / f"{case}.gguf")
        loaded[case] = load_model(folder / f"{case}.gguf")
    return loaded


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, count).astype(np.int32)


def tables(runner: Runner, rows: int, pages: int = 4, order: np.ndarray | None = None) -> np.ndarray:
    free = np.arange(runner.num_pages) if order is None else order
    out = np.zeros((rows, runner.max_pages_per_slot), np.int32)
    out[:, :pages] = free[: rows * pages].reshape(rows, pages)
    return out


@pytest.mark.parametrize("case", SOME)
def test_chunks_and_single_steps_agree_with_one_pass(models: dict, case: str) -> None:
    runner = Runner(models[case], max_batch=1)
    ids, table = tokens(200), tables(runner, 1)
    whole = runner.step_all(ids, 0, table[0])
    parts = [runner.step_all(ids[a:b], a, table[0]) for a, b in [(0, 1), (1, 17), (17, 130), (130, 190)]]
    parts += [np.asarray(runner.step([ids[i : i + 1]], [i], table))[:1] for i in range(190, 200)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("case", SOME)
def test_a_row_does_not_depend_on_the_batch_or_on_its_pages(models: dict, case: str) -> None:
    runner = Runner(models[case], max_batch=4)
    shuffled = np.random.default_rng(1).permutation(runner.num_pages)
    lengths = [150, 5, 1, 17]
    prompts = [tokens(n, seed=n) for n in lengths]

    def run(members: list[int], order: np.ndarray | None) -> list[np.ndarray]:
        """Logits of every step, per member: the prompt in chunks, then four greedy tokens."""
        table = tables(runner, len(members), order=order)
        outputs: list[list[np.ndarray]] = [[] for _ in members]
        at = [0] * len(members)
        while active := [i for i, m in enumerate(members) if at[i] < lengths[m]]:
            chunks = [prompts[members[i]][at[i] : at[i] + runner.chunk] for i in active]
            out = np.asarray(runner.step(chunks, [at[i] for i in active], table[active]))
            for row, i, chunk in zip(out, active, chunks, strict=False):
                outputs[i].append(row)
                at[i] += len(chunk)
        for _ in range(4):
            chosen = [np.array([rows[-1].argmax()], np.int32) for rows in outputs]
            out = np.asarray(runner.step(chosen, at, table))
            for i, rows in enumerate(outputs):
                rows.append(out[i])
                at[i] += 1
        return [np.stack(rows) for rows in outputs]

    together = run(list(range(4)), None)
    for members in ([0], [2], [1, 3], [3, 2, 0]):
        for member, alone in zip(members, run(members, shuffled), strict=True):
            np.testing.assert_array_equal(alone, together[member])


@pytest.mark.parametrize("case", CASES)
def test_rows_of_others_are_never_read(models: dict, case: str) -> None:
    runner = Runner(models[case], max_batch=2)
    ids, table = tokens(40), tables(runner, 2)
    clean = np.asarray(runner.step([ids], [0], table[:1]))[0]
    poisoned = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), runner.executor.pool)
    runner.executor.pool = poisoned
    np.testing.assert_array_equal(np.asarray(runner.step([ids], [0], table[:1]))[0], clean)


def test_no_program_is_compiled_twice_and_there_are_few(models: dict) -> None:
    runner = Runner(models["llama"], max_batch=8)
    table = tables(runner, 8)
    for rows in range(1, 9):
        for size in (1, 2, 15, 16, 17, 100, 128):
            runner.step([tokens(size)] * rows, [0] * rows, table[:rows])
    assert runner.compiled == 4 + 2 * 6  # 1, 2, 4, 8 rows of one token; 1, 2, 3, 4, 6, 8 of 16 and of 128
    named: list[str] = []
    runner.executor.on_compile = named.append
    runner.step([tokens(3), tokens(77), tokens(1)], [9, 30, 100], table[:3])
    assert named == []


def test_mixed_batches_compile_nothing_once_their_buckets_are_warm(models: dict, caplog) -> None:
    """Who is in which group, and a prompt's exact length, make no program; the rows come back in their order."""
    runner = Runner(models["llama"], max_batch=8)
    table = tables(runner, 8)

    def mixed(decoding: int, chunks: int, size: int) -> None:
        rows = [tokens(1, seed=i) for i in range(decoding)] + [tokens(size + i, seed=i) for i in range(chunks)]
        rows = rows[::2] + rows[1::2]
        out = np.asarray(runner.step(rows, [0] * len(rows), table[: len(rows)]))
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(out[i], np.asarray(runner.step([row], [0], table[:1]))[0])

    for decoding, chunks in ((3, 3), (3, 4), (4, 3), (4, 4)):
        mixed(decoding, chunks, 9)
    runner.step_all(tokens(150), 0, table[0])
    with jax.log_compiles():
        for decoding, chunks in ((3, 3), (3, 4), (4, 3), (4, 4)):
            mixed(decoding, chunks, 11)
        for count in (147, 149):
            assert runner.step_all(tokens(count), 0, table[0]).shape == (count, runner.vocab_size)
    assert [record.message for record in caplog.records if "ompil" in record.message] == []


def jaxpr_of(model, rows: int, size: int) -> jax.extend.core.ClosedJaxpr:
    runner = Runner(model, max_batch=rows)
    captured = {}

    def program(wanted, args):
        run = partial(run_batch, config=model.config, plan=model.plan, backend="xla", wanted=wanted)
        captured["jaxpr"] = jax.make_jaxpr(run)(*args)
        raise StopIteration

    runner.executor._program = program
    with pytest.raises(StopIteration):
        runner._run("last", [tokens(size)] * rows, [0] * rows, tables(runner, rows), size)
    return captured["jaxpr"]


def count(jaxpr, found: dict) -> dict:
    """How often each primitive occurs, loop bodies counted once, and the trip counts of scans."""
    for eqn in jaxpr.eqns:
        found[eqn.primitive.name] = found.get(eqn.primitive.name, 0) + 1
        if eqn.primitive.name == "scan":
            found.setdefault("lengths", []).append(eqn.params["length"])
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    count(inner, found)
    return found


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (8, 1), (8, 16)])
def test_batch_holds_one_matmul_per_weight_and_no_loop_over_requests(models: dict, rows: int, size: int) -> None:
    model = models["llama"]
    found = count(jaxpr_of(model, rows, size).jaxpr, {})
    weights = len(model.params.stacks) + 1  # and the head
    assert found["dot_general"] == weights + 2  # scores, and the mixing of values
    assert found["lengths"] == [model.config.num_layers]
    assert found["while"] == 2  # over blocks of the context, four of which make a partial result


def test_compiled_program_does_not_grow_with_depth(tmp_path: Path) -> None:
    sizes = []
    for layers in (4, 64):
        path = tmp_path / f"{layers}.gguf"
        tiny_models.write_spec(tiny_models._llama(layers=layers), path, label="depth")
        model = load_model(path)
        assert model.plan.bodies == 1
        sizes.append(len(str(jaxpr_of(model, 2, 1)).splitlines()))
    assert sizes[1] <= 1.05 * sizes[0]


@pytest.mark.parametrize("name", ["pallas", "cuda", ""])
def test_backends_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(BackendError, match="backend"):
        resolve_backend(name)
