"""The source model of a surgery; for several checkpoints, their mean."""

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
    """Returns the model that an operator, by its name, turns into `model`.

    Raises:
      UserError: the checkpoint's metadata does not describe its model.
    """
    if operator in DENSE_OPERATORS or (operator is not None and EXPERT_OPERATORS[operator].starts_from is Start.MOE):
        description = reader.metadata.get('model')
        if not description:
            raise UserError(f'the metadata of {reader.path} does not describe its model.')
        return model.saved(description)
    return model.dense()


def unread_params(reader: Reader, leaves: Leaves, known: Mapping[str, jax.Array]) -> Params:
    """Returns the parameters of a checkpoint. Those that are not `known` are `Unread`, to be read one at a time.

    Args:
      reader: of the checkpoint.
      leaves: of the surgery's target, with their shardings.
      known: parameters by their names in the checkpoint.
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
    """Returns a function that reads the mean of some leaves. If one process cannot read its part, all of them fail."""
    return lambda: hosts.together(
        lambda: (
            sum(reader.read(source, sharding) for source in sources) / len(sources)
            if len(sources) > 1
            else reader.read(sources[0], sharding)
        )
    )


def _shardings(leaves: Leaves) -> Callable[[str, tuple[int, ...]], jax.sharding.Sharding]:
    """Returns a function from a leaf's name and shape to the sharding of the target's leaf or its experts, if that divides it."""
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
    """The source of a surgery in progress.

    Args:
      model: the target's model.
      plan: of the surgery.
      reader: of the source.
      leaves: of the target, with their shardings.
    """

    def __init__(self, model: Model, plan: Plan, reader: Reader, leaves: Leaves):
        self._target_model, self._plan, self._reader, self._leaves = model, plan, reader, leaves

    @property
    def model(self) -> Model:
        """The source's model.

        Raises:
          UserError: the checkpoint's metadata does not describe it.
        """
        made_by = self._plan.spec.made_by
        return source_model(self._target_model, None if made_by is None else made_by.name, self._reader)

    def params(self, target: Mapping[str, jax.Array]) -> Params:
        """Returns the source's parameters: those that the target kept, the others unread."""
        same = (Action.KEEP, Action.MEAN, Action.RESIZE)
        known = {
            row.sources[0].partition('@')[0]: target[row.target]
            for row in self._plan.rows
            if row.action in same and row.target in target
        }
        return unread_params(self._reader, self._leaves, known)

    def hidden_states(self, batch: Mapping[str, jax.Array], target: Mapping[str, jax.Array], mlp: str) -> np.ndarray:
        """Computes the inputs of the MLP or MoE layer at a path on a batch, without padding: (N, D), on the host.

        Runs the layers below it again for each path, so that the states of only one layer are held at a time.

        Raises:
          UserError: the checkpoint's metadata does not describe its model.
        """
        try:
            model = self.model
        except UserError as error:
            raise UserError(
                f"ROUTER_INIT = 'hidden' must run the model of {self._reader.path}, whose metadata does not describe it: use "
                'another ROUTER_INIT.'
            ) from error
        path = mlp.removeprefix('params/')
        mesh = next(iter(self._leaves.values())).sharding.mesh

        def states(params: Params, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
            _, activations = forward_and_activations(model, params, batch, (path,))
            x_BxLxD, _, real_BxL = activations[path]
            return {path: (x_BxLxD, real_BxL)}

        with partitioning.use(mesh):
            ((_, sharded),) = streamed(states, self.params(target), batch)
            whole = jax.jit(lambda arrays: arrays, out_shardings=partitioning.replicated(mesh))(sharded)
        x_BxLxD, real_BxL = (np.asarray(x.addressable_data(0)) for x in whole)
        return x_BxLxD[real_BxL]
