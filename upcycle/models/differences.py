"""Differences in size between a model and the model of a checkpoint, as fields of configurations."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from upcycle.errors import UserError
from upcycle.models import Model, identify
from upcycle.moe.config import MoEConfig


class Difference(NamedTuple):
    """A field that differs: its class and name, its value in the model (`here`) and in the checkpoint (`there`)."""

    kind: type
    field: str
    here: Any
    there: Any


def differences(
    model: Model, path: str, leaves: identify.Leaves, facts: Mapping[str, Any], problems: Iterable[str]
) -> list[Difference]:
    """Compares a model with the model of a checkpoint that does not fit it.

    Args:
      model: from the gin files.
      path: of the checkpoint.
      leaves: of the checkpoint.
      facts: of the checkpoint; see `identify.facts_of`.
      problems: sentences about the leaves that do not fit.

    Returns:
      The fields that differ; empty if the checkpoint is of an unknown family.
    """
    try:
        there = identify.dense_model(path, leaves, facts).config
    except UserError:
        return []
    here = model.dense().config
    if type(here) is not type(there):
        return []
    differing = [
        Difference(type(here), name, getattr(here, name), getattr(there, name))
        for name in model.sizes(leaves, list(problems))
        if getattr(here, name) != getattr(there, name)
    ]
    return differing + _of_experts(model, leaves)


def _of_experts(model: Model, leaves: identify.Leaves) -> list[Difference]:
    """Compares the number and places of experts, if both models have experts."""
    here, there = model.moe_layers(), identify.moe_layers(leaves)
    if not here or not there:
        return []
    differing = []
    counts = {
        leaf.shape[0]
        for name, leaf in leaves.items()
        if name.startswith('params/') and '/expert/' in name and leaf.shape
    }
    moe = next(iter(here.values()))
    if len(counts) == 1 and counts != {moe.num_experts}:
        differing.append(Difference(MoEConfig, 'num_experts', moe.num_experts, *counts))
    places: dict[str, tuple[set[int], set[int]]] = {}
    for side, paths in enumerate((here, (path.removeprefix('params/') for path in there))):
        for layer in paths:
            number = re.search(r'_(\d+)/', layer)
            names = (f'{layer.split("/")[0]}_moe_layers', 'moe_layers')
            field = next((name for name in names if hasattr(model.config, name)), None)
            if number is not None and field is not None:
                places.setdefault(field, (set(), set()))[side].add(int(number[1]))
    for field, (ours, theirs) in places.items():
        if ours != theirs:
            differing.append(Difference(type(model.config), field, sorted(ours), sorted(theirs)))
    return differing
