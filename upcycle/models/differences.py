"""In which sizes a model and the one that a checkpoint holds differ, by the fields of our configurations."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from upcycle.errors import UserError
from upcycle.models import Model, identify
from upcycle.moe.config import MoEConfig


class Difference(NamedTuple):
    """One field: the class and the name of it, its value in the model, and in the checkpoint."""

    kind: type
    field: str
    here: Any
    there: Any


def differences(
    model: Model, path: str, leaves: identify.Leaves, facts: Mapping[str, Any], problems: Iterable[str]
) -> list[Difference]:
    """How to make the model that a checkpoint holds out of one that it does not fit.

    Args:
      model: as the gin files describe it.
      path: of the checkpoint.
      leaves: of the checkpoint.
      facts: what it says of itself.
      problems: sentences about the leaves that do not fit.

    Returns:
      The fields that differ; none where the checkpoint is no model that we know.
    """
    try:
        there = identify.dense_model(path, leaves, facts).config
    except UserError:
        return []
    here = model.config
    if type(here) is not type(there):
        return []
    found = [
        Difference(type(here), name, *values)
        for name in model.sizes(leaves, list(problems))
        if (values := (_plain(getattr(here, name)), _plain(getattr(there, name))))[0] != values[1]
    ]
    return found + _of_experts(model, leaves)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _of_experts(model: Model, leaves: identify.Leaves) -> list[Difference]:
    """Number and places of experts, where both have some."""
    here, there = model.moe_layers(), identify.moe_layers(leaves)
    if not here or not there:
        return []
    found = []
    counts = {
        leaf.shape[0]
        for name, leaf in leaves.items()
        if name.startswith('params/') and '/expert/' in name and leaf.shape
    }
    moe = next(iter(here.values()))
    if len(counts) == 1 and counts != {moe.num_experts}:
        found.append(Difference(MoEConfig, 'num_experts', moe.num_experts, *counts))
    places: dict[str, tuple[list[int], list[int]]] = {}
    for side, paths in enumerate((here, (path.removeprefix('params/') for path in there))):
        for layer in paths:
            number = re.search(r'_(\d+)/', layer)
            names = (f'{layer.split("/")[0]}_moe_layers', 'moe_layers')
            field = next((name for name in names if hasattr(model.config, name)), None)
            if number is not None and field is not None:
                places.setdefault(field, ([], []))[side].append(int(number[1]))
    for field, (ours, theirs) in places.items():
        if sorted(ours) != sorted(theirs):
            found.append(Difference(type(model.config), field, sorted(ours), sorted(theirs)))
    return found
