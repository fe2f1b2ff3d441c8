"""Low-rank adapters, one per row of a batch, added to the results of linear layers."""

from ..errors import UnsupportedError
from .api import BACKENDS, grouped_lora, grouped_lora_many, resolve
from .case import DTYPES, Case

__all__ = ["BACKENDS", "DTYPES", "Case", "UnsupportedError", "grouped_lora", "grouped_lora_many", "resolve"]
