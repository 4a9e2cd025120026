"""Plan, surgery and receipt of a model that is not ours, by the same steps as for ours."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from upcycle import partitioning, trees
from upcycle.checkpoints.memory import MemoryReader
from upcycle.checkpoints.several import SeveralReader
from upcycle.errors import DifferentLeaves, UserError
from upcycle.foreign.optimizer import OptimizerTree, add_state
from upcycle.foreign.outline import Named, Outline, outline_of, without_index
from upcycle.foreign.rules import PathRules, State
from upcycle.in_memory import carry_out, check_surgery, receipt_of
from upcycle.surgery.plan import PARAMS, Action, Plan, Surgery, is_clock
from upcycle.surgery.planning import plan_surgery

Shardings = dict[str, jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class _Dense:
    """One dense model, its leaves named.

    Attributes:
      given: what the user gave: parameters, or a `State`.
      tree: its parameters.
      outline: names, shapes and axes.
      optimizer: the optimizer state that the sparse model needs; None: there is none.
      reader: of its leaves by names of ours.
    """

    given: Any
    tree: trees.Tree
    outline: Outline
    optimizer: OptimizerTree | None
    reader: MemoryReader

    @classmethod
    def of(cls, given: Any, rules: PathRules, surgery: Surgery) -> '_Dense':
        """Names the leaves.

        Raises:
          UserError: rules and tree do not fit.
        """
        state = given if isinstance(given, State) else None
        tree = trees.Tree.of(given if state is None else state.params)
        outline = outline_of(tree.leaves, rules, surgery)
        arrays = {name: tree.leaves[source.name] for name, source in outline.sources.items()}
        optimizer = None
        if state is not None:
            shapes = {
                target.name: jax.ShapeDtypeStruct(target.shape, target.leaf.dtype)
                for target in outline.targets.values()
            }
            optimizer = add_state(outline, arrays, state, tree.like(shapes), surgery)
        # Only experts that there are already may lie otherwise than for us.
        arrays = {name: _in_ours(leaf, outline.sources[name]) for name, leaf in arrays.items()}
        return cls(given, tree, outline, optimizer, MemoryReader(arrays, None if state is None else state.step))

    @property
    def params(self) -> Any:
        """Its parameters, as the user gave them."""
        return self.given.params if isinstance(self.given, State) else self.given


def plan_foreign(dense: Any, rules: PathRules, surgery: Surgery) -> Plan:
    """The plan of `upcycle_foreign`, by the user's names; see `api.plan`."""
    models = _models(dense, rules, surgery)
    return _in_their_words(_plan(models, surgery), models[0].outline)


def upcycle_foreign(
    dense: Any, rules: PathRules, surgery: Surgery, *, key: jax.Array, mesh: Mesh | None, batch: Any
) -> tuple[Any, dict[str, Any]]:
    """Makes an MoE of a model that is not ours; see `api.upcycle`."""
    if batch is not None and None in (rules.dense_apply, rules.sparse_apply):
        raise UserError(
            'a batch is given, and the rules lack `dense_apply` or `sparse_apply`, which are compared on it.'
        )
    models = _models(dense, rules, surgery)
    first, outline = models[0], models[0].outline
    if batch is not None and len(models) > 1:
        raise UserError('a batch is given, and no single one of several dense models is what the sparse one computes.')
    hidden_states = None if batch is None else rules.hidden_states
    check_surgery(
        surgery,
        has_state=first.optimizer is not None,
        has_hidden=hidden_states is not None,
        way_out='give a batch, and `hidden_states` in the rules',
    )

    def hidden(target: Mapping[str, jax.Array], mlp: str) -> np.ndarray:
        states = np.asarray(hidden_states(first.params, outline.theirs(mlp), batch))
        return states.reshape(-1, states.shape[-1])

    plan = _plan(models, surgery)
    shardings = {row.target: _sharding(first, row.target, row.sources, mesh) for row in plan.rows}
    known = dataclasses.replace(plan, rows=tuple(row for row in plan.rows if row.action is not Action.NEW))
    reader = _reader(models)
    done = carry_out(known, reader, shardings, key, hidden=hidden, names=outline.theirs)
    leaves = {name: _in_theirs(leaf, outline.targets[name], mesh) for name, leaf in done.leaves.items()}
    params = first.tree.like(
        {outline.targets[name].name: leaf for name, leaf in leaves.items() if name.startswith(PARAMS)}
    )
    receipt = receipt_of(_in_their_words(plan, outline), reader, key, done)
    receipt['function_check'] = dict.fromkeys(('whole_model', 'layers'), 'not compared: no batch was given')
    if batch is not None:
        gap = function_gap(rules.dense_apply(first.params, batch), rules.sparse_apply(params, batch))
        receipt['function_check'] = {'whole_model': gap, 'layers': 'not compared: they are not ours'}
    if first.optimizer is None:
        return params, receipt
    leaves |= _fresh(first, params, leaves, shardings, mesh)
    opt_state = jax.tree.unflatten(first.optimizer.structure, [leaves[name] for name in first.optimizer.names])
    return dataclasses.replace(first.given, params=params, opt_state=opt_state), receipt


def function_gap(dense: Any, sparse: Any) -> dict[str, float]:
    """How far the outputs of two models are apart.

    Args:
      dense: an array or a tree of arrays.
      sparse: the same of the other model.

    Returns:
      `max_abs_difference`; `dense_rms`, the root mean square of the dense output; and `gap`, |sparse - dense| / |dense| (norms).

    Raises:
      UserError: the outputs are of different structure or shape.
    """
    shapes = [jax.tree.map(jnp.shape, output) for output in (dense, sparse)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f'dense_apply returns {shapes[0]} and sparse_apply {shapes[1]}: both must return the same shapes.'
        )
    x, y = (
        np.concatenate(
            [partitioning.whole_on_host(leaf).astype(np.float32).ravel() for leaf in jax.tree.leaves(output)]
        )
        for output in (dense, sparse)
    )
    return {
        'max_abs_difference': float(np.abs(x - y).max()),
        'dense_rms': float(np.sqrt(np.mean(np.square(x)))),
        'gap': float(np.linalg.norm(x - y) / max(np.linalg.norm(x), 1e-30)),
    }


def _models(dense: Any, rules: PathRules, surgery: Surgery) -> list[_Dense]:
    """The dense model, or several."""
    if surgery.operator is None:
        raise UserError(
            "path rules make experts, and the surgery has operator=None: use another one, such as Surgery('copy')."
        )
    if isinstance(dense, list | tuple) and not dense:
        raise UserError('there is nothing to start from: the list of dense models is empty.')
    return [_Dense.of(one, rules, surgery) for one in (dense if isinstance(dense, list | tuple) else [dense])]


def _reader(models: list[_Dense]) -> MemoryReader | SeveralReader:
    return models[0].reader if len(models) == 1 else SeveralReader([model.reader for model in models])


def _plan(models: list[_Dense], surgery: Surgery) -> Plan:
    """The plan by names of ours.

    Raises:
      UserError: the operator does not suit.
    """
    outline = models[0].outline
    wanted = {name: target.leaf for name, target in outline.targets.items()}
    axes = {name: target.axes for name, target in outline.targets.items() if target.axes}
    try:
        plan = plan_surgery(_reader(models).leaves(), wanted, surgery, axes)
    except DifferentLeaves as error:
        names = sorted({*outline.targets, *outline.sources}, key=len, reverse=True)
        known = re.compile('|'.join(map(re.escape, names)))
        problems = [known.sub(lambda found: outline.theirs(found[0]), problem) for problem in error.problems]
        raise DifferentLeaves('The parameters do not fit the rules and the surgery', problems) from None
    # Fresh state is what the optimizer starts with, which need not be zeros.
    return dataclasses.replace(
        plan,
        rows=tuple(
            dataclasses.replace(row, action=Action.NEW)
            if row.action is Action.ZEROS and row.target.startswith('opt_state/') and not is_clock(row.target)
            else row
            for row in plan.rows
        ),
    )


def _in_their_words(plan: Plan, outline: Outline) -> Plan:
    """A plan to look at, by the user's names and in the shapes of the user's arrays."""
    rows = []
    for row in plan.rows:
        target = outline.targets[row.target]
        sources = tuple(map(outline.theirs, row.sources))
        axes = target.in_theirs(row.axes) if row.axes else ()
        rows.append(dataclasses.replace(row, target=target.name, sources=sources, shape=target.shape, axes=axes))
    dropped = {outline.theirs(name): reason for name, reason in plan.dropped.items()}
    return dataclasses.replace(plan, rows=tuple(rows), dropped=dropped | outline.dropped)


def _in_ours(leaf: Any, source: Named) -> Any:
    """An array, or its shape, with its axes as ours."""
    if not source.order:
        return leaf
    if not hasattr(leaf, 'transpose'):
        return source.leaf
    return leaf.transpose([source.order.index(axis) for axis in range(len(source.order))])


def _in_theirs(leaf: jax.Array, target: Named, mesh: Mesh | None) -> jax.Array:
    """An array with its axes as the user's, on the user's own mesh, whose axes may be of another type than surgery needs."""
    sharding = _turned(leaf.sharding, target)
    if target.order:
        leaf = jax.jit(lambda leaf: leaf.transpose(target.order), out_shardings=sharding)(leaf)
    return leaf if mesh is None else jax.device_put(leaf, NamedSharding(mesh, sharding.spec))


def _turned(sharding: jax.sharding.Sharding, target: Named) -> jax.sharding.Sharding:
    """The sharding of an array whose axes are as the user's."""
    if not target.order or not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * (len(target.order) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*target.in_theirs(spec)))


def _sharding(dense: _Dense, name: str, sources: tuple[str, ...], mesh: Mesh | None) -> jax.sharding.Sharding:
    """Where a leaf lies: as its source, if that is on the same mesh, experts along `expert`; otherwise by its axes."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    target = dense.outline.targets[name]
    shape = target.leaf.shape
    spec = tuple(partitioning.mesh_axes(PartitionSpec(*(target.axes or (None,) * len(shape))), shape, auto))
    source = dense.outline.sources.get(without_index(sources[0])) if sources else None
    placed = None if source is None else getattr(dense.tree.leaves.get(source.name), 'sharding', None)
    if isinstance(placed, NamedSharding) and not source.order and _alike(placed.mesh, mesh):
        theirs = (*placed.spec, *(None,) * (len(source.leaf.shape) - len(placed.spec)))
        inherited = (*spec[: len(shape) - len(theirs)], *theirs)
        if _can_lie(auto, inherited, shape):
            spec = inherited
    return NamedSharding(auto, PartitionSpec(*spec))


def _alike(left: Any, right: Mesh) -> bool:
    """Whether two meshes are the same but for the types of their axes."""
    return (
        isinstance(left, Mesh)
        and left.axis_names == right.axis_names
        and left.devices.shape == right.devices.shape
        and (left.devices == right.devices).all()
    )


def _can_lie(mesh: Mesh, spec: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether a leaf can be split so: no axis of the mesh twice, and evenly."""
    names = [name for axes in spec if axes is not None for name in ((axes,) if isinstance(axes, str) else axes)]
    if len(spec) != len(shape) or len({*names}) < len(names):
        return False
    try:
        NamedSharding(mesh, PartitionSpec(*spec)).shard_shape(shape)
    except ValueError:
        return False
    return True


def _fresh(
    dense: _Dense, params: Any, made: Mapping[str, jax.Array], shardings: Shardings, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """The leaves of the optimizer's first state that nothing else was made of, in the user's axes."""
    missing = {name: i for i, name in enumerate(dense.optimizer.names) if name not in made}
    places = {}
    for name in missing:
        sharding = _turned(shardings[name], dense.outline.targets[name])
        places[name] = sharding if mesh is None else NamedSharding(mesh, sharding.spec)

    def init(params: Any) -> dict[str, jax.Array]:
        leaves = jax.tree.leaves(dense.given.init(params))
        return {name: leaves[i] for name, i in missing.items()}

    return jax.jit(init, out_shardings=places)(params) if missing else {}
