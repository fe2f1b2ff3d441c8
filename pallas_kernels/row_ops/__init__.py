"""Small operations on rows that the large ones stand between: normalization and gated activations."""

from ..errors import UnsupportedError
from .api import ACTIVATIONS, BACKENDS, argmax, gated, rms_norm, top_mask

__all__ = ["ACTIVATIONS", "BACKENDS", "UnsupportedError", "argmax", "gated", "rms_norm", "top_mask"]
