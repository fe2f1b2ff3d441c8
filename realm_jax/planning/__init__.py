"""Planning: what a model takes and gives on devices that are not here. Nothing but `compiling` imports jax."""

from realm_jax.planning.outline import SHAPES, Outline, read_outline
from realm_jax.planning.plan import Plan, plan
from realm_jax.planning.text import render
from realm_jax.planning.topology import DEVICES, Device, Topology

__all__ = ["DEVICES", "SHAPES", "Device", "Outline", "Plan", "Topology", "plan", "read_outline", "render"]
