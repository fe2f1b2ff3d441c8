"""What a model may be planned for: kinds of devices, and how many are joined how. No jax in here."""

import os
import re
from dataclasses import dataclass
from math import prod
from typing import Literal

from realm_jax.errors import InvalidRequestError
from realm_jax.planning.machine import this_machine

MAX_DEVICES = 1 << 16
GPU_SHARE = 0.75  # of a GPU's memory that JAX takes when XLA_PYTHON_CLIENT_MEM_FRACTION does not say otherwise


@dataclass(frozen=True)
class Device:
    """One device and its links, by published figures; what a program gets of them is less.

    memory: bytes. bandwidth: bytes a second of its memory. flops: dense bfloat16 operations a second. link: bytes a
    second that it sends to the others around a ring. launch, hop: seconds that a collective takes at least, and that
    each step around its ring adds. node: devices that links join. network: bytes a second it sends to other nodes; 0
    where there are none. reserved: bytes of the memory that the runtime keeps.
    """

    name: str
    platform: Literal["gpu", "tpu", "cpu"]
    memory: int
    bandwidth: float
    flops: float
    link: float = 0.0
    launch: float = 0.0
    hop: float = 0.0
    node: int = 1
    network: float = 0.0
    reserved: int = 0

    @property
    def usable(self) -> int:
        """Bytes of memory that JAX gives to a process."""
        if self.platform != "gpu":
            return self.memory - self.reserved
        share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
        return int(self.memory * (float(share) if re.fullmatch(r"0?\.\d+|1(\.0*)?", share) else GPU_SHARE))


_MIB, _GIB = 1 << 20, 1 << 30
# NCCL's own model of a ring with its protocol for small messages (src/graph/tuning.cc): microseconds to begin, and for
# each step over NVLink or PCI Express.
_NCCL, _NVLINK, _PCI = 6.6e-6, 0.6e-6, 1.0e-6
_ICI = 0.5e-6  # about a microsecond a hop, and both directions of the ring at once take half the steps


def _gpu(name: str, mib: int, bandwidth: float, flops: float, link: float, network: float = 0.0) -> Device:
    hop = _NVLINK if network else _PCI
    return Device(name, "gpu", mib * _MIB, bandwidth, flops, link, _NCCL, hop, node=8, network=network)


def _tpu(name: str, gib: int, free: float, bandwidth: float, flops: float, link: float, pod: int) -> Device:
    reserved = int((gib - free) * _GIB)
    return Device(name, "tpu", gib * _GIB, bandwidth, flops, link, hop=_ICI, node=pod, reserved=reserved)


# GPUs: memory as the driver reports it; the rest from NVIDIA's data sheets of the SXM modules (A100, H100, H200), of
# DGX B200, and of the L4, T4 and RTX 4090 cards: tensor cores without sparsity, half of "bidirectional" for the link,
# and the network adapters of the DGX of that generation, one for each GPU.
# TPUs: jax-ml.github.io/scaling-book, chapters on TPUs and sharding, the link being both directions of one ring;
# cloud.google.com/tpu/docs has the same figures of the chips. What of a chip's memory programs may use is what libtpu
# says when one does not fit.
DEVICES: dict[str, Device] = {
    "a100-40": _gpu("NVIDIA A100 40 GB", 40_960, 1.555e12, 312e12, 300e9, 25e9),
    "a100-80": _gpu("NVIDIA A100 80 GB", 81_920, 2.039e12, 312e12, 300e9, 25e9),
    "h100": _gpu("NVIDIA H100", 81_559, 3.35e12, 989e12, 450e9, 50e9),
    "h200": _gpu("NVIDIA H200", 143_771, 4.8e12, 989e12, 450e9, 50e9),
    "b200": _gpu("NVIDIA B200", 183_359, 8.0e12, 2250e12, 900e9, 50e9),
    "l4": _gpu("NVIDIA L4", 23_034, 300e9, 121e12, 32e9),
    "t4": _gpu("NVIDIA T4", 15_360, 320e9, 65e12, 16e9),  # float16: it has no bfloat16
    "rtx4090": _gpu("NVIDIA RTX 4090", 24_564, 1.008e12, 165e12, 32e9),
    "v4": _tpu("TPU v4", 32, 30.5, 1.2e12, 275e12, 90e9, 16 * 16 * 16),
    "v5e": _tpu("TPU v5e", 16, 15.75, 8.2e11, 197e12, 90e9, 16 * 16),
    "v5p": _tpu("TPU v5p", 96, 95.73, 2.8e12, 459e12, 180e9, 16 * 20 * 28),
    "v6e": _tpu("TPU v6e", 32, 31.24, 1.6e12, 920e12, 180e9, 16 * 16),
}


@dataclass(frozen=True)
class Topology:
    """So many devices of a kind. shape: how they lie; a TPU's chips lie in two or three dimensions."""

    kind: str
    shape: tuple[int, ...]
    device: Device

    @property
    def devices(self) -> int:
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """From "h100:8", "v5e:4x4" or "cpu:2"; without a colon, one device. "cpu" measures this machine.

        Raises:
            InvalidRequestError: an unknown kind, or a number or shape that there is not.
        """
        kind, colon, size = text.strip().lower().partition(":")
        device = DEVICES.get(kind)
        if device is None and kind != "cpu":
            raise InvalidRequestError(f"topology {text!r} is not known; accepted: {accepted()}")
        tpu = device is not None and device.platform == "tpu"
        dimensions = (2, 3) if kind in ("v4", "v5p") else (2,) if tpu else (1,)
        numbers = size.split("x") if colon else ["1"] * dimensions[0]
        shape = tuple(int(n) if re.fullmatch(r"[0-9]{1,5}", n, re.ASCII) else 0 for n in numbers)
        wanted = "NxM or NxMxK" if len(dimensions) > 1 else "NxM" if tpu else "N"
        if len(shape) not in dimensions or not all(shape) or prod(shape) > MAX_DEVICES:
            raise InvalidRequestError(f"topology is {text!r}; accepted: {kind}:{wanted}, up to {MAX_DEVICES:,} devices")
        if device is None:
            return cls(kind, shape, _cpu(shape[0]))
        if prod(shape) > device.node and not device.network:
            raise InvalidRequestError(
                f"topology {text!r} has {prod(shape)} devices; accepted: {kind}:{wanted}, up to the {device.node} that "
                f"one {'pod' if tpu else 'machine'} has"
            )
        return cls(kind, shape, device)

    def link(self, group: int, apart: int) -> float:
        """Bytes a second that each of a group of devices sends around a ring.

        apart: from one of the group to the next, in devices. Those of a group that are in one node share its network
        adapters, where the group spans nodes.
        """
        d = self.device
        if group * apart <= d.node:
            return d.link
        return min(d.link, max(1, d.node // apart) * d.network)


def accepted() -> str:
    """The topologies that there are, for messages."""
    tpus = [f"{kind}:NxM" for kind, device in DEVICES.items() if device.platform == "tpu"]
    gpus = [f"{kind}:N" for kind, device in DEVICES.items() if device.platform == "gpu"]
    return ", ".join([*gpus, *tpus, "cpu:N"])


def _cpu(parts: int) -> Device:
    """One of n devices that this machine's processor is divided into. They share all it has."""
    m = this_machine()
    share = 1.0 / parts
    # What one sends another it writes and the other reads, in the same memory.
    link = m.bandwidth * share / 2
    return Device(
        "this machine's processor", "cpu", int(m.memory * share), m.bandwidth * share, m.flops * share, link, node=parts
    )
