"""The model that a surgery starts from, for whoever compares the result with it; of several checkpoints their mean."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from upcycle.checkpoints import Reader
from upcycle.errors import UserError
from upcycle.models import Model, Params
from upcycle.surgery.execute import without_leading_axis
from upcycle.surgery.operators import DENSE_OPERATORS, EXPERT_OPERATORS, Start
from upcycle.surgery.plan import Action, Plan

Leaves = Mapping[str, jax.ShapeDtypeStruct]


def source_model(model: Model, operator: str | None, reader: Reader) -> Model | None:
    """What an operator, by its name, makes `model` of; None where nothing says what model the checkpoint holds."""
    if operator in DENSE_OPERATORS or (operator is not None and EXPERT_OPERATORS[operator].starts_from is Start.MOE):
        description = reader.metadata.get('model')
        return model.saved(description) if description else None
    return model.dense()


def read_params(
    reader: Reader,
    sharding: Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding],
    known: Mapping[str, jax.Array],
) -> Params:
    """The parameters of a checkpoint, without reading those that are known; `sharding` says where the others will lie."""
    stored = reader.leaves()
    several: dict[str, list[str]] = {}
    for name in stored:
        if name.startswith('params/'):
            several.setdefault(name.partition('@')[0], []).append(name)
    found = {name: leaf for name, leaf in known.items() if name in several}
    for name, sources in several.items():
        if name not in found:
            where = sharding(name, stored[sources[0]])
            found[name] = sum(reader.read(source, where) for source in sources) / len(sources)
    return unflatten_dict(found, sep='/')['params']


class Source:
    """The source of a surgery under way. What is read of dense MLPs is a small part of the experts, so it is kept.

    Args:
      model: that is being made.
      what: the surgery.
      reader: of the source.
      leaves: of the target, with their shardings.
    """

    def __init__(self, model: Model, what: Plan, reader: Reader, leaves: Leaves):
        self._what, self._reader, self._leaves = what, reader, leaves
        made_by = what.spec.made_by
        self.model = source_model(model, None if made_by is None else made_by.name, reader)
        self._whole = leaves['step'].sharding
        self._states: dict[str, tuple[jax.Array, jax.Array]] | None = None
        self._mlps: dict[str, jax.Array] = {}
        self._mlp_shardings = {}
        operator = what.spec.operator
        if operator is not None and operator.starts_from is Start.DENSE:
            self._mlp_shardings = {
                name: without_leading_axis(leaves[row.target].sharding)
                for row in what.rows
                if row.action is Action.EXPERTS
                for name in row.sources
            }

    def keep(self, name: str, leaf: jax.Array | np.ndarray) -> None:
        """Keeps a leaf that was read, if it is part of a dense MLP."""
        if name in self._mlp_shardings:
            self._mlps[name] = jax.device_put(leaf, self._mlp_shardings[name])

    def params(self, target: Mapping[str, jax.Array]) -> Params:
        """Its parameters; those that the target kept are the target's."""
        same = (Action.KEEP, Action.MEAN, Action.RESIZE)
        known = {
            row.sources[0].partition('@')[0]: target[row.target]
            for row in self._what.rows
            if row.action in same and row.target in target
        }
        return read_params(self._reader, self._sharding, known | self._mlps)

    def hidden_states(self, batch: Mapping[str, jax.Array], target: Mapping[str, jax.Array], mlp: str) -> jax.Array:
        """What the MLP or MoE layer at a path reads on a batch, real tokens only: (N, D).

        Raises:
          UserError: nothing says what model the checkpoint holds.
        """
        if self._states is None:
            self._states = self._all_states(batch, target)
        x_BxLxD, real_BxL = (np.asarray(x.addressable_data(0)) for x in self._states[mlp.removeprefix('params/')])
        return jnp.asarray(x_BxLxD[real_BxL])

    def _all_states(
        self, batch: Mapping[str, jax.Array], target: Mapping[str, jax.Array]
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        model = self.model
        if model is None:
            raise UserError(
                f"ROUTER_INIT = 'hidden' must run the model of {self._reader.path}, whose metadata does not describe it: use "
                'another one.'
            )
        paths = tuple(path.removeprefix('params/') for path in model.moe_layers() or self._what.mlps)

        def inputs(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
            io = model.mlp_activations(params, batch, paths)
            return {path: (x_BxLxD, real_BxL) for path, (x_BxLxD, _, real_BxL) in io.items()}

        return jax.jit(inputs, out_shardings=self._whole)(self.params(target), batch)

    def _sharding(self, name: str, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        """As the target's leaf of the same name lies, where that divides."""
        found = self._leaves.get(name)
        if found is None or len(found.shape) != len(leaf.shape):
            return self._whole
        try:
            found.sharding.shard_shape(leaf.shape)
        except ValueError:
            return self._whole
        return found.sharding
