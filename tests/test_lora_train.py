"""Training: gradients through packed weights, a loss that falls, and the adapter it makes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from realm_jax.errors import AdapterError, InvalidRequestError
from realm_jax.lora import merge, read_adapter, weight_shapes
from realm_jax.lora.checkpoint_format import write_checkpoint
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.lora.train import Example, loss_of, scores_of, train
from realm_jax.model import load_model
from realm_jax.model.params import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "llama.gguf"
    tiny_models.write_tiny_model("llama", path, weight_type="Q8_0")
    return load_model(path)


EXAMPLES = [Example((5, 9, 70 + i, 33, 101, 120 + i), 3) for i in range(4)]


@pytest.mark.slow
def test_training_teaches_the_answers(model: Model, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    roles = ("attn_q.weight", "attn_v.weight", "ffn_down.weight")
    adapter, losses = train(
        model, EXAMPLES, roles=roles, steps=60, learning_rate=2e-2, progress=lambda *step: seen.append(step)
    )
    assert seen == list(enumerate(losses, 1))
    assert losses[0] > 3
    assert losses[-1] < 0.1
    assert (adapter.rank, adapter.roles, len(adapter.pairs)) == (4, set(roles), 9)
    write_gguf(adapter, tmp_path / "a.gguf", 8.0)
    assert read_adapter(tmp_path / "a.gguf", model.config, weight_shapes(model)).content_hash == adapter.content_hash
    merged, _ = merge(model, adapter, "F32")
    for example in EXAMPLES:
        best = np.asarray(scores_of(merged, jnp.asarray(example.tokens, jnp.int32))).argmax(1)
        assert tuple(best[example.answer - 1 : -1]) == example.tokens[example.answer :]


def test_an_interrupted_training_goes_on_with_the_same_bits(model: Model, tmp_path: Path) -> None:
    settings = {"roles": ("attn_q.weight",), "steps": 5, "batch": 3, "rank": 2}
    expected, all_losses = train(model, EXAMPLES, **settings)

    def interrupt(number: int, loss: float) -> None:
        if number == 4:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        train(model, EXAMPLES, **settings, state=state, save_every=2, progress=interrupt)
    for refused in ({"rank": 3}, {"steps": 9}, {"seed": 1}, {"learning_rate": 1.0}):
        [(name, value)] = refused.items()
        with pytest.raises(InvalidRequestError, match=f"has {name} .*, and {value} was asked for"):
            train(model, EXAMPLES, **(settings | refused), state=state)
    with pytest.raises(InvalidRequestError, match="has examples"):
        train(model, EXAMPLES[:3], **settings, state=state)
    seen: list[int] = []
    adapter, losses = train(model, EXAMPLES, **settings, state=state, progress=lambda step, _: seen.append(step))
    assert seen == [3, 4, 5]
    assert losses == all_losses
    assert adapter.content_hash == expected.content_hash
    again, losses = train(model, EXAMPLES, **settings, state=state)  # it has ended: nothing is left to do
    assert (again.content_hash, losses) == (expected.content_hash, all_losses)

    write_checkpoint(adapter, tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter", model.config, weight_shapes(model))
    assert found.content_hash == expected.content_hash
    with pytest.raises(AdapterError, match="of the kind 'training state'; 'adapter' is accepted"):
        read_adapter(state, model.config, weight_shapes(model))
    with pytest.raises(AdapterError, match="made for another model"):
        read_adapter(tmp_path / "adapter", model.config, dict.fromkeys(weight_shapes(model), (8, 8)))
    (tmp_path / "adapter" / "state" / "_METADATA").write_text("{}")
    with pytest.raises(AdapterError, match=r"is damaged: the file 'state/_METADATA' has 2 bytes"):
        read_adapter(tmp_path / "adapter", model.config, weight_shapes(model))


def test_gradients_are_those_of_finite_differences(model: Model) -> None:
    rng = np.random.default_rng(0)
    shapes = weight_shapes(model)
    tokens, learned = jnp.array([[5, 9, 70, 33, 101]], jnp.int32), jnp.array([[0, 0, 0, 1, 1]], jnp.float32)

    def matrices():
        return {
            role: tuple(
                jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32)
                for shape in ((3, 1, 2, shapes[role, 0][1]), (3, 1, shapes[role, 0][0], 2))
            )
            for role in ("attn_k.weight", "ffn_up.weight")
        }

    at, along = matrices(), matrices()

    @jax.jit
    def moved(t):
        return loss_of(model, jax.tree.map(lambda x, d: x + t * d, at, along), 2.0, tokens, learned)

    slope = float(jax.grad(moved)(0.0))
    h = 1e-2
    assert abs(slope) > 1e-2
    assert slope == pytest.approx(float((moved(h) - moved(-h)) / (2 * h)), rel=5e-3)


def test_what_cannot_be_trained(model: Model) -> None:
    for examples, message in (
        ([], "there are no examples"),
        ([Example((1, 2), 0)], "an example of 2 tokens has its answer at 0"),
        ([Example((1, 2), 2)], "its answer at 2; from 1 to the last token"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            train(model, examples)
    with pytest.raises(
        InvalidRequestError, match=r"not every layer has a matrix 'attn_qkv\.weight'; there are: attn_k"
    ):
        train(model, EXAMPLES, roles=["attn_qkv.weight"])
