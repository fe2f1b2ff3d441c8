"""Meshes of devices, and arrays put together on them from the parts that each device has."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from realm_jax.errors import InvalidRequestError
from realm_jax.sharding.mesh import MESH_AXES, MeshShape

Place = dict[str, int]  # mesh axis -> index along it


def make_mesh(shape: MeshShape) -> Mesh:
    """A mesh of the first devices there are. InvalidRequestError when they are too few, or other than a job has."""
    devices = jax.devices()
    if shape.devices > len(devices):
        more = ""
        if devices[0].platform == "cpu":
            more = f"; JAX_NUM_CPU_DEVICES={shape.devices} in the environment makes as many of a CPU"
        raise InvalidRequestError(
            f"mesh {shape} needs {shape.devices} devices, and there are {len(devices)} ({devices[0].platform}){more}"
        )
    if jax.process_count() > 1 and shape.devices != len(devices):
        raise InvalidRequestError(
            f"mesh {shape} is of {shape.devices} devices; accepted in a job of several processes: "
            f"all {len(devices)} that they have"
        )
    # Of type Auto, unlike those of jax.make_mesh.
    return Mesh(np.asarray(devices[: shape.devices]).reshape(tuple(shape.sizes.values())), MESH_AXES)


def local_places(mesh: Mesh) -> list[tuple[jax.Device, Place]]:
    """The devices of this process, each with its place on the mesh."""
    here = jax.process_index()
    return [
        (device, dict(zip(mesh.axis_names, index)))
        for index, device in np.ndenumerate(mesh.devices)
        if device.process_index == here
    ]


def assemble(part: Callable[[Place], Any], mesh: Mesh, axes: tuple[Any, ...]) -> jax.Array:
    """One array from what part(place) gives each device of this process: its part, on the host or anywhere.

    axes: the mesh axis that divides each axis of the array, or None, as in a PartitionSpec. No process tells another
    what it puts: all must know the same.
    """
    pieces = [jax.device_put(part(place), device) for device, place in local_places(mesh)]
    sizes = dict(mesh.shape)
    together = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
    shape = tuple(n * prod(sizes[a] for a in names) for n, names in zip(pieces[0].shape, together, strict=True))
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, P(*axes)), pieces)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """A pytree of host arrays, whole on every device of a mesh; None: on JAX's default device."""
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(lambda value: assemble(lambda _: value, mesh, (None,) * np.ndim(value)), tree)


def divide(array: np.ndarray, mesh: Mesh, axis: str) -> Any:
    """A host array, the same in every process, for a program that divides its first axis over a mesh axis."""
    if jax.process_count() == 1 or mesh.shape[axis] == 1:
        return array  # JAX does it on the way in
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P(axis)), lambda index: array[index])


def first_copy(array: jax.Array) -> jax.Array:
    """What the first device of this process holds of an array that is whole on every device, as an array of its own."""
    return array.addressable_data(0)
