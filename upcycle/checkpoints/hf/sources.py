"""Maps the tensors of a folder to our arrays by the table of an architecture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints import safetensors, views
from upcycle.checkpoints.hf.architecture import Architecture, Entry, Table, Tensors
from upcycle.errors import UserError
from upcycle.leaf_names import grouped

CONFIG = 'config.json'

# Inserted into names by torch.compile, DistributedDataParallel, FSDP, activation checkpointing and Lightning.
_WRAPPERS = re.compile(
    r'(^model\.|(?<![^.])(_orig_mod|module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)'
)
_ADAPTERS = re.compile(r'(^|[._])lora_|\.base_layer\.|^base_model\.')


def renamed(folder: epath.Path, stored: Tensors, architecture: Architecture) -> Tensors:
    """Returns the tensors by their names in the table, without the prefixes of wrappers.

    Raises:
      UserError: there are tensors of an adapter, or two tensors get the same name.
    """
    if adapters := [name for name in stored if _ADAPTERS.search(name)]:
        raise UserError(
            f"{folder} holds an adapter that is not merged ({adapters[0]}): merge it with peft's merge_and_unload, and save the "
            'model again.'
        )
    out: dict[str, safetensors.Tensor] = {}
    stored_names: dict[str, str] = {}
    for theirs, tensor in stored.items():
        name = theirs
        while (shorter := _WRAPPERS.sub('', name)) != name:
            name = shorter
        name = architecture.rename(name)
        if name in out:
            raise UserError(f'{folder} has two arrays for {name}: {stored_names[name]} and {theirs}.')
        out[name], stored_names[name] = tensor, theirs
    return out


def by_table(folder: epath.Path, stored: Tensors, table: Table) -> dict[str, views.Lazy]:
    """Returns our arrays by their names below `params/`, in the order of the tensors. The table may have more leaves.

    Raises:
      UserError: a tensor is unknown, a stack is incomplete, or a shape does not fit.
    """
    ours: dict[str, list[str]] = {}  # several leaves may share a tensor
    for name, entry in table.items():
        for theirs in entry.every_name:
            ours.setdefault(theirs, []).append(name)
    _refuse_unknown(folder, [name for name in stored if name not in ours], ours)
    named = dict.fromkeys(name for theirs in stored for name in ours[theirs])
    return {name: _source(folder, stored, name, table[name]) for name in named}


def _source(folder: epath.Path, stored: Tensors, name: str, entry: Entry) -> views.Lazy:
    if missing := [theirs for theirs in entry.every_name if theirs not in stored]:
        raise UserError(
            f'{folder} has no {missing[0]}, one of {len(entry.every_name)} arrays of {name}: copy the checkpoint again.'
        )
    converted = []
    for theirs, part in entry.pieces:
        try:
            tensor = stored[theirs] if part is None else part.of(stored[theirs])
            converted.append(entry.turn.to_ours(tensor))
        except ValueError as error:
            shape = list(stored[theirs].shape)
            raise UserError(f'{theirs} of {folder} has the wrong shape {shape} ({error}).') from error
    if not entry.is_stack:
        return converted[0]
    try:
        return views.Stacked(tuple(converted))
    except ValueError as error:
        raise UserError(f'the arrays of {name} in {folder} cannot be stacked ({error}).') from error


def _refuse_unknown(folder: epath.Path, unknown: list[str], known: Mapping[str, Any]) -> None:
    if not unknown:
        return
    listing = ', '.join(grouped(unknown, 5))
    rests = {name.partition('.')[2] for name in unknown}
    if len(prefixes := {name.partition('.')[0] for name in unknown}) == 1 and rests <= known.keys():
        raise UserError(
            f"{folder}: the names of {len(unknown)} arrays begin with '{prefixes.pop()}.', as if the model were a part of "
            f'another one: save the inner model ({listing}).'
        )
    raise UserError(f'{folder} holds unknown arrays: {listing}.')


def require_depth(folder: epath.Path, architecture: Architecture, config: Mapping[str, Any], stored: Tensors) -> None:
    """Raises UserError if configuration and tensors differ in the number of layers."""
    for field, pattern in architecture.depths.items():
        layers = {int(match[1]) for name in stored if (match := re.match(pattern, name))}
        if layers:
            _require_equal(folder, config, field, 1 + max(layers))


def require_sizes(
    folder: epath.Path, architecture: Architecture, config: Mapping[str, Any], sources: Mapping[str, views.Lazy]
) -> None:
    """Raises UserError if a size in the configuration is not that of the arrays, as far as these exist."""
    try:
        sizes = architecture.compared_sizes({name: source.shape for name, source in sources.items()})
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return  # an array is missing, which `identify.check` reports
    for field, size in sizes.items():
        if field in architecture.sizes:
            _require_equal(folder, config, field, size)


def _require_equal(folder: epath.Path, config: Mapping[str, Any], field: str, size: Any) -> None:
    if config.get(field, size) != size:
        shown = schema.shown(config[field])
        raise UserError(f'{folder / CONFIG}: {field} is {shown}, but the arrays have {size}.')


def required(folder: epath.Path, config: Mapping[str, Any], *fields: str) -> list[Any]:
    """Returns fields of a configuration; raises UserError if one is missing."""
    for field in fields:
        if field not in config:
            raise UserError(f'{folder / CONFIG} lacks the field {field!r}: copy the file from the original model.')
    return [config[field] for field in fields]


def are_equal(one: views.Lazy, other: views.Lazy) -> bool:
    """Whether two arrays are equal bit by bit. Reads some rows at a time."""
    if (one.shape, one.dtype) != (other.shape, other.dtype) or not one.shape:
        return one.shape == other.shape and one.read(()).tobytes() == other.read(()).tobytes()
    rows = max(1, views.READ_BYTES * one.shape[0] // max(1, math.prod(one.shape) * one.dtype.itemsize))
    regions = [(slice(start, start + rows),) for start in range(0, one.shape[0], rows)]
    return all(one.read(region).tobytes() == other.read(region).tobytes() for region in regions)
