"""In which sizes a model and the one that a checkpoint holds differ, by the fields of our configurations."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from upcycle.errors import UserError
from upcycle.models import Model, identify

# Sizes that have a default; those without one are all looked at.
_MORE_SIZES = ('image_channels', 'representation_size')
# Leaves of every shape may belong to any of these.
_NOT_IN_SHAPES = ('gelu', 'norm_epsilon')
# Fields that shapes do not tell in every model: only where such a leaf does not fit.
_ONLY_WITH = {'image_size': 'pos_embedding', 'num_classes': 'head/'}


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
    problems = list(problems)
    sizes = [field.name for field in dataclasses.fields(here) if field.default is dataclasses.MISSING]
    found = [
        Difference(type(here), name, *values)
        for name in dict.fromkeys((*sizes, *_MORE_SIZES, *identify.FACTS))
        if name not in _NOT_IN_SHAPES
        and (name != 'num_classes' or 'params/head/kernel' in leaves)  # a backbone has no number of classes
        and (values := (_plain(getattr(here, name, None)), _plain(getattr(there, name, None))))[0] != values[1]
        and (name not in _ONLY_WITH or any(_ONLY_WITH[name] in problem for problem in problems))
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
        found.append(Difference(type(moe), 'num_experts', moe.num_experts, *counts))
    places: dict[str, tuple[list[int], list[int]]] = {}
    for side, paths in enumerate((here, (path.removeprefix('params/') for path in there))):
        for layer in paths:
            stack, number = layer.split('/')[0], re.search(r'_(\d+)/', layer)
            if number is not None:
                places.setdefault(stack, ([], []))[side].append(int(number[1]))
    for stack, (ours, theirs) in places.items():
        names = (f'{stack}_moe_layers', 'moe_layers')
        field = next((name for name in names if hasattr(model.config, name)), None)
        if field is not None and sorted(ours) != sorted(theirs):
            found.append(Difference(type(model.config), field, sorted(ours), sorted(theirs)))
    return found
