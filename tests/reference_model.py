"""An independent forward in plain numpy: the reference our decoder is compared to.

It reads a GGUF file with gguf-py, dequantizes with gguf.quants, keeps no cache, attends over the whole sequence at
once, and imports nothing of realm_jax. In float64 (the default) it is exact to far below every tolerance; float32 is
for models of real size.
"""

from functools import cached_property
from pathlib import Path

import gguf
import numpy as np

NEOX_ROPE = {"qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "olmo2", "gpt-oss"}
GEMMA = {"gemma2", "gemma3"}
# Softmax routers that rescale the chosen experts' weights to a sum of one.
NORMALISED_EXPERTS = {"llama", "qwen3moe", "granite", "granitemoe"}
WINDOW_PATTERN = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "olmo2": 4}  # every n-th layer sees everything


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class ReferenceModel:
    """A GGUF file's weights in float, and the forward over them. Holds every weight it has used in full precision."""

    def __init__(self, path: str | Path, *, dtype: type = np.float64):
        self._reader = gguf.GGUFReader(str(path))
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
        self._weights: dict[str, np.ndarray] = {}
        self.dtype = dtype
        self.architecture: str = self._reader.fields["general.architecture"].contents()
        self.layers: int = self.key("block_count")
        self.width: int = self.key("embedding_length")
        self.heads: int = self.key("attention.head_count")
        self.kv_heads: int = self.key("attention.head_count_kv", self.heads)
        self.key_length: int = self.key("attention.key_length", self.width // self.heads)
        self.value_length: int = self.key("attention.value_length", self.width // self.heads)
        self.rotated: int = self.key("rope.dimension_count", self.key_length)
        self.epsilon: float = self.key("attention.layer_norm_rms_epsilon")

    def key(self, name: str, default=None):
        """The value of "<architecture>.<name>"; KeyError if absent without a default."""
        entry = self._reader.fields.get(f"{self.architecture}.{name}")
        if entry is None:
            if default is None:
                raise KeyError(name)
            return default
        return entry.contents()

    def has(self, name: str) -> bool:
        return name in self._stored

    def weight(self, name: str) -> np.ndarray:
        """The dequantized tensor, outermost dimension first."""
        if name not in self._weights:
            tensor = self._stored[name]
            shape = [int(n) for n in reversed(tensor.shape)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            self._weights[name] = values.astype(self.dtype)
        return self._weights[name]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.weight(name + ".weight").T
        return y + self.weight(name + ".bias") if self.has(name + ".bias") else y

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weight(name + ".weight")

    @cached_property
    def windowed(self) -> list[bool]:
        """Which layers see only the last `attention.sliding_window` tokens."""
        if self.architecture not in WINDOW_PATTERN or not self.key("attention.sliding_window", 0):
            return [False] * self.layers
        pattern = self.key("attention.sliding_window_pattern", WINDOW_PATTERN[self.architecture])
        if isinstance(pattern, list):
            return [bool(p) for p in pattern]
        return [layer % pattern < pattern - 1 for layer in range(self.layers)]

    def rope(self, x: np.ndarray, layer: int, context_length: int) -> np.ndarray:
        """Rotates the first `rotated` entries of each head; x is [T, heads, size]."""
        arch, n, windowed = self.architecture, self.rotated, self.windowed[layer]
        base = self.key("rope.freq_base", 10000.0)
        kind = self.key("rope.scaling.type", "linear")
        factor = 1.0 if kind == "none" else self.key("rope.scaling.factor", 1.0)
        original = self.key("rope.scaling.original_context_length", self.key("context_length"))
        magnitude = self.key("rope.scaling.attn_factor", 1.0)
        if windowed and arch == "gemma3":
            base, factor = self.key("rope.freq_base_swa", 10000.0), 1.0
        elif windowed and arch == "olmo2":
            kind, factor, magnitude = "none", 1.0, 1.0
        elif windowed:
            base = self.key("rope.freq_base_swa", base)

        theta = base ** (-np.arange(0, n, 2) / n)
        if self.has("rope_freqs.weight"):
            theta = theta / self.weight("rope_freqs.weight")
        elif self.has("rope_factors_long.weight"):
            theta = theta / self.weight(f"rope_factors_{'long' if context_length > original else 'short'}.weight")
        if kind == "yarn":

            def dimension(turns: float) -> float:  # the dimension that turns so many times in the original context
                return n * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base))

            low, high = max(0, np.floor(dimension(32))), min(n - 1, np.ceil(dimension(1)))
            keep = 1 - np.clip((np.arange(n // 2) - low) / max(0.001, high - low), 0, 1)
            theta = theta / factor * (1 - keep) + theta * keep
            if arch != "deepseek2" or not self.key("rope.scaling.yarn_log_multiplier", 0.0):
                magnitude *= 1 + 0.1 * np.log(factor)
        else:
            theta = theta / factor

        angle = np.arange(len(x))[:, None, None] * theta
        cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
        first, second = (slice(0, n // 2), slice(n // 2, n)) if arch in NEOX_ROPE else (slice(0, n, 2), slice(1, n, 2))
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, layer: int) -> np.ndarray:
        """q [T, heads, size], k and v [T, kv heads, size] -> [T, heads * value size]."""
        steps, group = len(q), q.shape[1] // k.shape[1]
        distance = np.arange(steps)[:, None] - np.arange(steps)[None, :]
        visible = distance >= 0
        if self.windowed[layer]:
            visible &= distance < self.key("attention.sliding_window")
        cap = self.key("attn_logit_softcapping", 50.0) if self.architecture == "gemma2" else 0.0
        out = np.empty((steps, q.shape[1], v.shape[2]), self.dtype)
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // group].T * scale
            if cap:
                scores = cap * np.tanh(scores / cap)
            scores = np.where(visible, scores, -np.inf)
            if self.has(f"blk.{layer}.attn_sinks.weight"):
                sink = np.full((steps, 1), self.weight(f"blk.{layer}.attn_sinks.weight")[head])
                probabilities = softmax(np.concatenate([scores, sink], 1))[:, :-1]
            else:
                probabilities = softmax(scores)
            out[:, head] = probabilities @ v[:, head // group]
        return out.reshape(steps, -1)

    def attention(self, h: np.ndarray, layer: int, context_length: int) -> np.ndarray:
        """h: the block's (normed) input [T, width] -> attention's output projection [T, width]."""
        if self.architecture == "deepseek2":
            return self.latent_attention(h, layer, context_length)
        arch, steps, blk = self.architecture, len(h), f"blk.{layer}."
        nq, nk = self.heads * self.key_length, self.kv_heads * self.key_length
        if self.has(blk + "attn_qkv.weight"):
            q, k, v = np.split(self.linear(h, blk + "attn_qkv"), [nq, nq + nk], axis=1)
        else:
            q, k, v = (self.linear(h, f"{blk}attn_{name}") for name in "qkv")
        if arch == "olmo2":  # over the whole projection, all other architectures within each head
            q, k = self.norm(q, blk + "attn_q_norm"), self.norm(k, blk + "attn_k_norm")
        q = q.reshape(steps, self.heads, self.key_length)
        k = k.reshape(steps, self.kv_heads, self.key_length)
        v = v.reshape(steps, self.kv_heads, self.value_length)
        if arch in ("qwen3", "qwen3moe", "gemma3"):
            q, k = self.norm(q, blk + "attn_q_norm"), self.norm(k, blk + "attn_k_norm")
        unrotated = (arch == "smollm3" and layer % 4 == 3) or (arch == "granite" and not self.rope_enabled)
        if not unrotated:
            q, k = self.rope(q, layer, context_length), self.rope(k, layer, context_length)
        scale = self.key_length**-0.5
        if arch in ("granite", "granitemoe"):
            scale = self.key("attention.scale", 0.0) or scale
        elif (arch, self.layers) in (("gemma2", 46), ("gemma3", 62)):  # the 27B models
            scale = (self.width // self.heads) ** -0.5
        return self.linear(self.attend(q, k, v, scale, layer), blk + "attn_output")

    @property
    def rope_enabled(self) -> bool:
        entry = self._reader.fields.get(f"{self.architecture}.rope.scaling.finetuned")
        return entry is None or bool(entry.contents())

    def latent_attention(self, h: np.ndarray, layer: int, context_length: int) -> np.ndarray:
        """DeepSeek's multi-head latent attention, decompressed: every head has its own keys and values."""
        steps, blk, rank, rotated = len(h), f"blk.{layer}.", self.key("attention.kv_lora_rank"), self.rotated
        head, value = (
            self.key("attention.key_length_mla", self.key_length),
            self.key("attention.value_length_mla", self.value_length),
        )
        nope = head - rotated
        if self.has(blk + "attn_q_a.weight"):
            q = self.linear(self.norm(self.linear(h, blk + "attn_q_a"), blk + "attn_q_a_norm"), blk + "attn_q_b")
        else:
            q = self.linear(h, blk + "attn_q")
        q = q.reshape(steps, self.heads, head)
        q = np.concatenate([q[..., :nope], self.rope(q[..., nope:], layer, context_length)], -1)
        compressed, k_rope = np.split(self.linear(h, blk + "attn_kv_a_mqa"), [rank], axis=1)
        compressed = self.norm(compressed, blk + "attn_kv_a_norm")
        k_rope = self.rope(k_rope[:, None, :], layer, context_length)
        if self.has(blk + "attn_kv_b.weight"):
            both = self.linear(compressed, blk + "attn_kv_b").reshape(steps, self.heads, nope + value)
            k_nope, v = both[..., :nope], both[..., nope:]
        else:
            k_nope = np.einsum("tr,hrn->thn", compressed, self.weight(blk + "attn_k_b.weight"))
            v = np.einsum("tr,hvr->thv", compressed, self.weight(blk + "attn_v_b.weight"))
        k = np.concatenate([k_nope, np.repeat(k_rope, self.heads, axis=1)], -1)
        scale = head**-0.5
        if self.key("rope.scaling.type", "linear") == "yarn":
            stretch = np.log(self.key("rope.scaling.factor", 1.0))
            multiplier = self.key("rope.scaling.yarn_log_multiplier", 0.0)
            # with a multiplier the magnitude is applied here, squared, and not in the rotation; without one in both
            scale *= (1 + multiplier * stretch) ** 2 if multiplier else (1 + 0.1 * stretch) ** 2
        return self.linear(self.attend(q, k, v, scale, layer), blk + "attn_output")

    def feed_forward(self, h: np.ndarray, prefix: str, suffix: str = "") -> np.ndarray:
        """A gated feed-forward; `prefix` is "blk.N.ffn_"."""
        if self.has(f"{prefix}gate{suffix}.weight"):
            gate, up = self.linear(h, f"{prefix}gate{suffix}"), self.linear(h, f"{prefix}up{suffix}")
        else:
            gate, up = np.split(self.linear(h, f"{prefix}up{suffix}"), 2, axis=1)
        activation = gelu_tanh if self.architecture in GEMMA else silu
        return self.linear(activation(gate) * up, f"{prefix}down{suffix}")

    def experts(self, h: np.ndarray, layer: int) -> np.ndarray:
        """The routed experts (and the shared one, if the file has it)."""
        arch, ffn = self.architecture, f"blk.{layer}.ffn_"
        count, used = self.key("expert_count"), self.key("expert_used_count")
        logits = self.linear(h, ffn + "gate_inp")
        if arch == "gpt-oss":
            scores = logits
        elif arch == "deepseek2" and self.key("expert_gating_func", 1) == 2:
            scores = sigmoid(logits)
        else:
            scores = softmax(logits)
        choice = scores.copy()
        if self.has(f"blk.{layer}.exp_probs_b.bias"):
            choice = choice + self.weight(f"blk.{layer}.exp_probs_b.bias")
        groups = self.key("expert_group_count", 0)
        if groups > 1:
            by_group = choice.reshape(len(h), groups, count // groups)
            strength = np.sort(by_group, -1)[..., -2:].sum(-1)
            dropped = np.argsort(-strength, axis=1)[:, self.key("expert_group_used_count") :]
            for row, which in enumerate(dropped):
                by_group[row, which] = -np.inf
            choice = by_group.reshape(len(h), count)
        chosen = np.argsort(-choice, axis=1)[:, :used]
        weights = np.take_along_axis(scores, chosen, 1)
        if arch == "gpt-oss":
            weights = softmax(weights)
        elif arch in NORMALISED_EXPERTS or (arch == "deepseek2" and self.key("expert_weights_norm", False)):
            weights = weights / weights.sum(1, keepdims=True)
        weights = weights * (self.key("expert_weights_scale", 0.0) or 1.0)

        def matrix(name: str, expert: int, x: np.ndarray) -> np.ndarray:
            y = x @ self.weight(f"{ffn}{name}_exps.weight")[expert].T
            return y + self.weight(f"{ffn}{name}_exps.bias")[expert] if self.has(f"{ffn}{name}_exps.bias") else y

        out = np.zeros_like(h)
        for expert in range(count):
            rows, slot = np.nonzero(chosen == expert)
            gate, up = matrix("gate", expert, h[rows]), matrix("up", expert, h[rows])
            if arch == "gpt-oss":
                gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
                inner = gate * sigmoid(1.702 * gate) * (up + 1)
            else:
                inner = silu(gate) * up
            out[rows] += weights[rows, slot][:, None] * matrix("down", expert, inner)
        if self.has(ffn + "gate_shexp.weight"):
            shared = self.feed_forward(h, ffn, "_shexp")
            if arch == "qwen2moe":
                shared = shared * sigmoid(h @ self.weight(ffn + "gate_inp_shexp.weight"))[:, None]
            out = out + shared
        return out

    def logits(self, tokens: list[int] | np.ndarray, *, context_length: int | None = None) -> np.ndarray:
        """[T, vocab], every position. `context_length` (default: the file's) only picks one of longrope's factors."""
        arch, context = self.architecture, context_length or self.key("context_length")
        x = self.weight("token_embd.weight")[np.asarray(tokens)]
        if arch in GEMMA:
            x = x * self.width**0.5
        x = x * (self.key("embedding_scale", 0.0) or 1.0)
        residual = self.key("residual_scale", 0.0) or 1.0
        for layer in range(self.layers):
            blk = f"blk.{layer}."
            h = x if arch == "olmo2" else self.norm(x, blk + "attn_norm")
            h = self.attention(h, layer, context)
            if arch in GEMMA or arch == "olmo2":
                h = self.norm(h, blk + "post_attention_norm")
            x = x + residual * h
            if arch == "olmo2":
                h = x
            else:
                h = self.norm(x, blk + ("post_attention_norm" if arch == "gpt-oss" else "ffn_norm"))
            h = self.experts(h, layer) if self.has(blk + "ffn_gate_inp.weight") else self.feed_forward(h, blk + "ffn_")
            if arch in GEMMA or arch == "olmo2":
                h = self.norm(h, blk + "post_ffw_norm")
            x = x + residual * h
        x = self.norm(x, "output_norm")
        logits = self.linear(x, "output" if self.has("output.weight") else "token_embd")
        if arch in ("granite", "granitemoe"):
            logits = logits / self.key("logit_scale")
        cap = self.key("final_logit_softcapping", 30.0 if arch == "gemma2" else 0.0) if arch in GEMMA else 0.0
        return cap * np.tanh(logits / cap) if cap else logits


def reference_logits(
    path: str | Path, tokens: list[int] | np.ndarray, *, context_length: int | None = None, dtype: type = np.float64
):
    """[T, vocab] logits of a GGUF file for one sequence: see ReferenceModel."""
    return ReferenceModel(path, dtype=dtype).logits(tokens, context_length=context_length)
