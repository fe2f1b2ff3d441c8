"""Shapes of real models, and which ggml type each of their matrices has in a file."""

from dataclasses import dataclass, replace

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
IQ_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
OTHERS = ("TQ1_0", "TQ2_0", "MXFP4")
MIXTURES = ("Q4_K_M",)
ALL_TYPES = (*LEGACY, *K_QUANTS, *IQ_TYPES, *OTHERS)


@dataclass(frozen=True)
class Shape:
    """Of a Llama model whose output matrix is its embedding."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int = 8192

    def matrices(self) -> list[tuple[str, int, int]]:
        """(name, N, K) of a layer's."""
        kv = self.hidden // self.heads * self.kv_heads
        return [
            ("attn_q", self.hidden, self.hidden),
            ("attn_k", kv, self.hidden),
            ("attn_v", kv, self.hidden),
            ("attn_output", self.hidden, self.hidden),
            ("ffn_gate", self.ffn, self.hidden),
            ("ffn_up", self.ffn, self.hidden),
            ("ffn_down", self.hidden, self.ffn),
        ]


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 49152),
    "8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "tiny": Shape(2, 256, 512, 4, 2, 512, context=1024),
    "least": Shape(1, 256, 256, 4, 2, 64, context=128),
}


def with_layers(shape: Shape, layers: int | None) -> Shape:
    """The shape cut to fewer layers, or as it is."""
    return shape if layers is None else replace(shape, layers=layers)


def type_of(mixture: str, role: str, layer: int, layers: int) -> str:
    """The ggml type of a matrix ("attn_v", "token_embd", ...) in a file of one type or of a mixture of types.

    The output matrix is Q6_K or Q8_0, as llama.cpp's quantizer makes it. Q4_K_M keeps half of attn_v and ffn_down in
    Q6_K: the first and last eighth of the layers and every third between.
    """
    if role in ("token_embd", "output"):
        return "Q8_0" if mixture == "Q8_0" else "Q6_K"
    if mixture != "Q4_K_M":
        return mixture
    edge = layers // 8
    more = layer < edge or layer >= layers - edge or (layer - edge) % 3 == 2
    return "Q6_K" if more and role in ("attn_v", "ffn_down") else "Q4_K"
