"""Dense layers of a model with experts as layers with equal experts, for layouts and engines without dense layers.

With weights of the chosen experts that sum to 1, experts that are all the dense MLP compute it, whatever the router says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Table
from upcycle.checkpoints.hf.decoder_only import facts as facts_lib
from upcycle.errors import UserError

KEY = 'equal_experts'  # of the metadata for a writer, and of `sizes`: the layers
NOTE = 'upcycle_equal_experts'  # in the headers of the files: the layers, separated by commas
# Settings of the router that must be these, or missing, for equal experts to compute their MLP.
_REQUIRED: Mapping[str, Any] = {
    'normalize_combine_weights': True,
    'expert_mlp_dim': None,
    'weight_scale': 1.0,
    'num_shared_experts': 0,
    'eval_capacity_factor': None,
}


def of_all_layers(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a model all of whose layers have experts; `KEY` names those that were dense.

    Raises:
      UserError: the model has no experts, or equal experts would not compute its dense layers.
    """
    facts = facts_lib.of_metadata(metadata)
    moe, depth = facts['moe'], facts['num_layers']
    if moe is None:
        raise UserError('--dense_layers=experts is for models with experts, and this one has none: remove it.')
    sparse = facts_lib.indices(facts['moe_layers'], depth)
    dense = [layer for layer in range(depth) if layer not in sparse]
    if not dense:
        return dict(metadata)
    for name, ours in _REQUIRED.items():
        if (value := moe.get(name, ours)) != ours:
            raise UserError(
                f'--dense_layers=experts would change the dense layers of this model, whose {name} is {schema.shown(value)}: '
                f'they are equal to experts only if it is {schema.shown(ours)}.'
            )
    model = metadata['model']
    return {**metadata, 'model': {**model, 'config': {**model['config'], 'moe_layers': 'all'}}, KEY: dense}


def _mlp(layer: int) -> str:
    return f'decoder/layers_{layer}/mlp/'


def routers(names: Iterable[str], layers: Sequence[int]) -> set[str]:
    """Returns the leaves of the routers of layers, which the dense model does not have."""
    starts = tuple(f'{_mlp(layer)}router/' for layer in layers)
    return {name for name in names if name.startswith(starts)}


def as_copies(table: Table, layers: Sequence[int]) -> Table:
    """Returns the table with the leaves of dense MLPs in place of those of the experts of layers."""
    starts = tuple(f'{_mlp(layer)}expert/' for layer in layers)
    changed = {}
    for name, entry in table.items():
        if name.startswith(starts):
            name, entry = name.replace('/expert/', '/'), dataclasses.replace(entry, copies=True)
        changed[name] = entry
    return changed
