"""From logical axes, which parameters, caches and adapters name, to mesh axes. The one table; no jax in here."""

# What is not named here is whole on every device.
RULES: dict[str, str] = {
    "rows": "data",  # of a batch: requests
    "pages": "data",
    "experts": "expert",
    "heads": "tensor",
    "kv_heads": "tensor",
    "qkv": "tensor",
    "ffn": "tensor",
    "expert_ffn": "tensor",
    "shared_ffn": "tensor",
    "vocab": "tensor",
}
