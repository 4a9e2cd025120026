"""The model that a surgery starts from, for whoever compares the result with it; of several checkpoints their mean."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from upcycle import hosts, partitioning
from upcycle.checkpoints import Reader
from upcycle.errors import UserError
from upcycle.models import Model, Params
from upcycle.models.activations import forward_and_activations
from upcycle.streamed import Unread, streamed
from upcycle.surgery.operators import DENSE_OPERATORS, EXPERT_OPERATORS, Start
from upcycle.surgery.place import without_leading_axis
from upcycle.surgery.plan import EXPERT, Action, Plan

Leaves = Mapping[str, jax.ShapeDtypeStruct]


def source_model(model: Model, operator: str | None, reader: Reader) -> Model:
    """What an operator, by its name, makes `model` of.

    Raises:
      UserError: nothing says what model the checkpoint holds.
    """
    if operator in DENSE_OPERATORS or (operator is not None and EXPERT_OPERATORS[operator].starts_from is Start.MOE):
        description = reader.metadata.get('model')
        if not description:
            raise UserError(f'the metadata of {reader.path} does not describe its model.')
        return model.saved(description)
    return model.dense()


def unread_params(reader: Reader, leaves: Leaves, known: Mapping[str, jax.Array]) -> Params:
    """The parameters of a checkpoint: those that are known, and the others to be read one at a time.

    Args:
      reader: of the checkpoint.
      leaves: of the model that is made of it, with their shardings.
      known: by their names in the checkpoint.
    """
    stored = reader.leaves()
    several: dict[str, list[str]] = {}
    for name in stored:
        if name.startswith('params/'):
            several.setdefault(name.partition('@')[0], []).append(name)
    sharding_of = _shardings(leaves)
    params: dict[str, Any] = {}
    for name, sources in several.items():
        leaf = stored[sources[0]]
        params[name] = known.get(name)
        if params[name] is None:
            read = _reading(reader, sources, sharding_of(name, leaf.shape))
            params[name] = Unread(leaf.shape, leaf.dtype, read)
    return unflatten_dict(params, sep='/')['params']


def _reading(reader: Reader, sources: list[str], sharding: jax.sharding.Sharding) -> Callable[[], jax.Array]:
    """Reads the mean of some leaves. A process that cannot read its part ends the others' waiting for it."""
    return lambda: hosts.together(
        lambda: (
            sum(reader.read(source, sharding) for source in sources) / len(sources)
            if len(sources) > 1
            else reader.read(sources[0], sharding)
        )
    )


def _shardings(leaves: Leaves) -> Callable[[str, tuple[int, ...]], jax.sharding.Sharding]:
    """Where leaves of the source lie: as the target's of the same name, or its experts; whole where that does not divide."""
    places = {name: leaf.sharding for name, leaf in leaves.items() if name.startswith('params/')}
    of_experts = {
        '/'.join(segment for segment in name.split('/') if segment != EXPERT): without_leading_axis(sharding)
        for name, sharding in places.items()
        if EXPERT in name.split('/')
    }
    places = of_experts | places
    whole = partitioning.replicated(next(iter(places.values())).mesh)

    def of(name: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        sharding = places.get(name, whole)
        try:
            sharding.shard_shape(shape)
        except ValueError:
            return whole
        return sharding

    return of


class SourceModel:
    """The source of a surgery under way.

    Args:
      model: that is being made.
      plan: of the surgery.
      reader: of the source.
      leaves: of the target, with their shardings.
    """

    def __init__(self, model: Model, plan: Plan, reader: Reader, leaves: Leaves):
        self._target_model, self._plan, self._reader, self._leaves = model, plan, reader, leaves

    @property
    def model(self) -> Model:
        """What model it is.

        Raises:
          UserError: nothing says so.
        """
        made_by = self._plan.spec.made_by
        return source_model(self._target_model, None if made_by is None else made_by.name, self._reader)

    def params(self, target: Mapping[str, jax.Array]) -> Params:
        """Its parameters; those that the target kept are the target's, the others unread."""
        same = (Action.KEEP, Action.MEAN, Action.RESIZE)
        known = {
            row.sources[0].partition('@')[0]: target[row.target]
            for row in self._plan.rows
            if row.action in same and row.target in target
        }
        return unread_params(self._reader, self._leaves, known)

    def hidden_states(self, batch: Mapping[str, jax.Array], target: Mapping[str, jax.Array], mlp: str) -> np.ndarray:
        """What the MLP or MoE layer at a path reads on a batch, real tokens only: (N, D), on the host.

        The layers below it are run for each path anew, so that the states of one layer are held at a time.

        Raises:
          UserError: nothing says what model the checkpoint holds.
        """
        try:
            model = self.model
        except UserError as error:
            raise UserError(
                f"ROUTER_INIT = 'hidden' must run the model of {self._reader.path}, whose metadata does not describe it: use "
                'another one.'
            ) from error
        path = mlp.removeprefix('params/')
        mesh = next(iter(self._leaves.values())).sharding.mesh

        def states(params: Params, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
            _, activations = forward_and_activations(model, params, batch, (path,))
            x_BxLxD, _, real_BxL = activations[path]
            return {path: (x_BxLxD, real_BxL)}

        with partitioning.use(mesh):
            ((_, found),) = streamed(states, self.params(target), batch)
            whole = jax.jit(lambda found: found, out_shardings=partitioning.replicated(mesh))(found)
        x_BxLxD, real_BxL = (np.asarray(x.addressable_data(0)) for x in whole)
        return x_BxLxD[real_BxL]
