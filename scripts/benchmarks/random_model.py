"""A model of a real shape whose weights are random arrays on the device: an engine's speed without a file."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant_matmul import FORMATS
from realm_jax.engine.runner import Runner
from realm_jax.model.config import ModelConfig, read_config
from realm_jax.model.params import Model, Params
from realm_jax.model.plan import plan_layers
from realm_jax.model.rope import rotation_tables
from realm_jax.model.tensors import TensorSpec, expected_tensors, group_by_stack
from realm_jax.quant import QuantizedTensor
from realm_jax.sampling import sample_greedy

from .random_weights import random_stack
from .shapes import Shape, type_of


def config_of(shape: Shape, context: int) -> ModelConfig:
    """Of a Llama model of that shape."""
    keys = {
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": shape.hidden // shape.heads,
    }
    metadata: dict[str, Any] = {f"llama.{name}": value for name, value in keys.items()}
    return read_config({"general.architecture": "llama", **metadata}, shape.vocabulary, context)


def random_model(shape: Shape, mixture: str, backend: str, context: int) -> Model:
    """Weights in rows, an output matrix of its own, everything else as loading a file would leave it."""
    config = config_of(shape, context)
    specs = [s for s in expected_tensors(config, {}) if s.required or s.role == "output.weight"]

    def kind_of(spec: TensorSpec) -> str:
        return type_of(mixture, spec.role.removesuffix(".weight"), spec.layer or 0, config.num_layers)

    groups, layer_stacks = group_by_stack(specs, kind_of)
    stacks: dict[str, QuantizedTensor] = {}
    vectors: dict[str, jax.Array] = {}
    tables: dict[str, Any] = {}
    for number, (stack, members) in enumerate(groups.items()):
        first = members[0]
        if first.is_matrix:
            kind = stack.rpartition(":")[2]
            arrays = random_stack(FORMATS[kind], len(members), *first.shape, seed=number)
            if first.layer is None:
                tables[first.role] = QuantizedTensor(jax.device_put({n: a[0] for n, a in arrays.items()}), kind)
            else:
                stacks[stack] = QuantizedTensor(jax.device_put(arrays), kind)
        elif first.layer is None:
            tables[first.role] = jnp.ones(first.shape, jnp.float32)
        else:
            vectors[stack] = jnp.ones((len(members), *first.shape), jnp.float32)
    rope = jax.device_put(rotation_tables(config.ropes, config.context_length, None))
    params = jax.block_until_ready(Params(stacks=stacks, vectors=vectors, tables=tables, rope=rope))
    return Model(params=params, config=config, plan=plan_layers(layer_stacks), backend=backend)


def read_bytes(model: Model) -> int:
    """Bytes of weights that one decode step reads: all but the embedding, of which it looks rows up."""
    return model.nbytes - model.params.tables["token_embd.weight"].nbytes


class Steps:
    """Decoding and prefill as the host loop does them: one program a step, each token through the host."""

    def __init__(self, model: Model, max_batch: int):
        self.runner = Runner(model, max_batch=max_batch)
        self._rng = np.random.default_rng(0)

    def decode(self, batch: int, steps: int, prompt: int) -> float:
        """Seconds of so many greedy steps of so many sequences, after prompts of so many tokens."""
        tables = self._tables(batch, prompt + steps)
        logits = self.runner.step([self._prompt(prompt) for _ in range(batch)], [0] * batch, tables)
        tokens = np.asarray(sample_greedy(logits))[:batch]
        begun = time.perf_counter()
        for at in range(prompt, prompt + steps):
            logits = self.runner.step([tokens[i : i + 1] for i in range(batch)], [at] * batch, tables)
            tokens = np.asarray(sample_greedy(logits))[:batch]
        seconds = time.perf_counter() - begun
        if tokens.min() < 0:
            raise RuntimeError("the logits are not finite")
        return seconds

    def prefill(self, tokens: int) -> float:
        """Seconds from a prompt of so many tokens to the first token after it."""
        tables = self._tables(1, tokens)
        prompt = self._prompt(tokens)
        begun = time.perf_counter()
        for at in range(0, tokens, self.runner.chunk):
            logits = self.runner.step([prompt[at : at + self.runner.chunk]], [at], tables)
        first = np.asarray(sample_greedy(logits))
        seconds = time.perf_counter() - begun
        if first[0] < 0:
            raise RuntimeError("the logits are not finite")
        return seconds

    def _prompt(self, length: int) -> np.ndarray:
        return self._rng.integers(0, self.runner.vocab_size, length, dtype=np.int32)

    def _tables(self, batch: int, tokens: int) -> np.ndarray:
        """Pages of each sequence, next to each other."""
        each = -(-tokens // self.runner.page_size)
        if each * batch > self.runner.num_pages or each > self.runner.max_pages_per_slot:
            raise ValueError(f"{batch} sequences of {tokens} tokens do not fit in {self.runner.num_pages} pages")
        tables = np.zeros((batch, self.runner.max_pages_per_slot), np.int32)
        tables[:, :each] = np.arange(batch * each).reshape(batch, each)
        return tables
