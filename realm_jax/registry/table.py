"""The table of models with a short name (models.toml): what each is and where its file comes from."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from realm_jax.registry.hub import HubName
from realm_jax.registry.pypi import WheelFile


@dataclass(frozen=True)
class ModelEntry:
    """One named model: what it is, its licence, and where its file comes from."""

    name: str
    about: str
    license: str
    source: WheelFile | HubName


@cache
def _table() -> tuple[str, dict[str, ModelEntry]]:
    table = tomllib.loads(resources.files("realm_jax.registry").joinpath("models.toml").read_text("utf-8"))
    entries: dict[str, ModelEntry] = {}
    for row in table["model"]:
        source: WheelFile | HubName
        source = WheelFile(**row.pop("pypi")) if "pypi" in row else HubName.parse(row.pop("hub"))
        entries[row["name"]] = ModelEntry(source=source, **row)
    return table["default"], entries


def default_name() -> str:
    """The name of the small model used where none is given."""
    return _table()[0]


def entries() -> dict[str, ModelEntry]:
    """Every named model by its name, in the table's order."""
    return dict(_table()[1])
