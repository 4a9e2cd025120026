"""Our arrays out of a folder's tensors, by the table of an architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints import views
from upcycle.checkpoints.hf.architecture import Architecture, Entry, Table, Tensors
from upcycle.errors import UserError
from upcycle.leaf_names import grouped

CONFIG = 'config.json'

# What torch.compile, DistributedDataParallel, FSDP, checkpointing of activations and Lightning put into a name.
_WRAPPERS = re.compile(
    r'(^model\.|(?<![^.])(_orig_mod|module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)'
)
_ADAPTERS = re.compile(r'(^|[._])lora_|\.base_layer\.|^base_model\.')


def renamed(folder: epath.Path, stored: Tensors, architecture: Architecture) -> Tensors:
    """The tensors by the names of the table, without what wrappers put before them.

    Raises:
        UserError: the tensors are those of an adapter, or two have the same name then.
    """
    if adapters := [name for name in stored if _ADAPTERS.search(name)]:
        raise UserError(
            f"{folder} holds an adapter that is not merged ({adapters[0]}): merge it with peft's merge_and_unload, and save the "
            'model again.'
        )
    out = {}
    came_from: dict[str, str] = {}
    for theirs, tensor in stored.items():
        name = theirs
        while (shorter := _WRAPPERS.sub('', name)) != name:
            name = shorter
        name = architecture.rename(name)
        if name in out:
            raise UserError(f'{folder} has two arrays for {name}: {came_from[name]} and {theirs}.')
        out[name], came_from[name] = tensor, theirs
    return out


def by_table(folder: epath.Path, stored: Tensors, table: Table) -> dict[str, views.Lazy]:
    """Our arrays by their names below `params/`, in the order of the tensors. A leaf of the table may be missing.

    Raises:
        UserError: a tensor is in no table, some of a stack are missing, or a shape does not fit.
    """
    ours = {theirs: name for name, entry in table.items() for theirs in entry.every_name}
    _refuse_unknown(folder, [name for name in stored if name not in ours], ours)
    out: dict[str, views.Lazy] = {}
    for theirs in stored:
        name = ours[theirs]
        if name not in out:
            out[name] = _source(folder, stored, name, table[name])
    return out


def _source(folder: epath.Path, stored: Tensors, name: str, entry: Entry) -> views.Lazy:
    if missing := [theirs for theirs in entry.every_name if theirs not in stored]:
        raise UserError(
            f'{folder} has no {missing[0]}, and {len(entry.every_name)} such arrays are one leaf ({name}): copy the checkpoint '
            'again.'
        )
    made = []
    for theirs in entry.every_name:
        try:
            made.append(entry.turn.to_ours(stored[theirs]))
        except ValueError as error:
            shape = list(stored[theirs].shape)
            raise UserError(f'{theirs} of {folder} is {shape}, which does not fit ({error}).') from error
    if not entry.is_stack:
        return made[0]
    try:
        return views.Stacked(tuple(made))
    except ValueError as error:
        raise UserError(f'{entry.every_name[0]} and the others of {folder} do not fit together ({error}).') from error


def _refuse_unknown(folder: epath.Path, unknown: list[str], known: Mapping[str, str]) -> None:
    if not unknown:
        return
    listing = ', '.join(grouped(unknown, 5))
    rests = {name.partition('.')[2] for name in unknown}
    if len(prefixes := {name.partition('.')[0] for name in unknown}) == 1 and rests <= known.keys():
        raise UserError(
            f"{folder}: the names of {len(unknown)} arrays begin with '{prefixes.pop()}.', as of a model inside another one: "
            f'save the inner model ({listing}).'
        )
    raise UserError(f'{folder} holds arrays that have no counterpart in our models: {listing}.')


def require_depth(folder: epath.Path, architecture: Architecture, config: Mapping[str, Any], stored: Tensors) -> None:
    """The configuration must have as many layers as the tensors."""
    for field, pattern in architecture.depths.items():
        layers = {int(match[1]) for name in stored if (match := re.match(pattern, name))}
        if field in config and layers and config[field] != 1 + max(layers):
            raise UserError(f'{folder / CONFIG}: {field} is {config[field]}, and the arrays have {1 + max(layers)}.')


def require_sizes(
    folder: epath.Path, architecture: Architecture, config: Mapping[str, Any], sources: Mapping[str, views.Lazy]
) -> None:
    """Sizes in the configuration must be those of the arrays, as far as these are there."""
    try:
        sizes = architecture.compared_sizes({name: source.shape for name, source in sources.items()})
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return  # An array is missing, as `identify.check` says.
    for field in sizes:
        if field in architecture.sizes and config.get(field, sizes[field]) != sizes[field]:
            raise UserError(
                f'{folder / CONFIG}: {field} is {schema.shown(config[field])}, and the arrays have {sizes[field]}.'
            )


def required(folder: epath.Path, config: Mapping[str, Any], *fields: str) -> list[Any]:
    """Fields that a configuration must have.

    Raises:
        UserError: one is missing.
    """
    for field in fields:
        if field not in config:
            raise UserError(f'{folder / CONFIG} does not say {field!r}.')
    return [config[field] for field in fields]
