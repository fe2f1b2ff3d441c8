"""Which device a program is compiled for, as far as that is known while it is traced."""

import re

import jax

# NVIDIA cards by the words of their names: 10 * major + minor of the compute capability. For abstract devices, which
# carry a name alone; a real card says it itself.
_CAPABILITIES = {
    70: ("V100",),
    75: ("T4",),
    80: ("A100", "A30"),
    86: ("A10", "A40", "A6000"),
    89: ("L4", "L40", "L40S", "4090"),
    90: ("H100", "H200", "GH200"),
    100: ("B200", "GB200"),
    103: ("B300", "GB300"),
    120: ("5090", "6000"),
}


def platform() -> str:
    """What programs are compiled for, "cpu", "gpu" or "tpu": as the abstract mesh in use says, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str | None:
    """The name of the accelerator, such as "NVIDIA H100 80GB HBM3" or "TPU v5e"; None where programs run on a CPU.

    The abstract mesh in use names it (that is how one compiles for a device that is not there), else it is the first
    device of this process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind
    return None if jax.default_backend() == "cpu" else jax.local_devices()[0].device_kind


def cuda_capability() -> int | None:
    """10 * major + minor of the NVIDIA card that is compiled for; None where there is none or its name is unknown."""
    if jax.sharding.get_abstract_mesh().abstract_device is None and jax.default_backend() == "gpu":
        text = getattr(jax.local_devices()[0], "compute_capability", None)  # "9.0"; ROCm has "gfx..."
        return int(text.replace(".", "")) if text and re.fullmatch(r"\d+\.\d", text) else None
    words = set(re.split(r"[\s-]+", device_kind() or ""))
    return next((number for number, names in _CAPABILITIES.items() if words & set(names)), None)
