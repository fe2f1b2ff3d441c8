"""The shape of a mesh, as users write it: "tensor=4,data=2". No jax in here; `devices` makes the mesh itself."""

from dataclasses import dataclass, fields
from math import prod

from realm_jax.errors import InvalidRequestError

MAX_DEVICES = 1 << 16


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis.

    data: each has its own requests and its part of the cache. expert: each has its part of every mixture's experts.
    tensor: each has its part of every matrix; the innermost, so that its devices are neighbours.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes, outermost first."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def devices(self) -> int:
        return prod(self.sizes.values())

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "one device"

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """From "tensor=4,data=2". Raises InvalidRequestError for anything else."""
        accepted = f'accepted: "auto", or sizes of {", ".join(MESH_AXES)} such as "tensor=4,data=2"'
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, equals, size = (piece.strip() for piece in part.partition("="))
            if axis not in MESH_AXES or axis in sizes or not equals or not (size.isascii() and size.isdigit()):
                raise InvalidRequestError(f"mesh is {text!r}; {accepted}")
            sizes[axis] = int(size[:9])
        shape = cls(**sizes)
        if not all(0 < size <= MAX_DEVICES for size in sizes.values()) or shape.devices > MAX_DEVICES:
            raise InvalidRequestError(f"mesh is {text!r}; each size must be 1 to {MAX_DEVICES:,}, all together too")
        return shape


MESH_AXES = tuple(field.name for field in fields(MeshShape))
