"""Plan, surgery and receipt of a foreign model."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from upcycle import partitioning, trees
from upcycle.checkpoints.memory import MemoryReader
from upcycle.checkpoints.several import SeveralReader
from upcycle.errors import DifferentLeaves, UserError
from upcycle.foreign.optimizer import OptimizerTree, add_state, without_key_type
from upcycle.foreign.outline import Named, Outline, outline_of, without_index
from upcycle.foreign.rules import PathRules, State
from upcycle.in_memory import auto_mesh, carry_out, check_surgery
from upcycle.surgery.plan import PARAMS, Action, Plan, Surgery, is_clock, mlp_of
from upcycle.surgery.planning import plan_surgery

Shardings = dict[str, jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class _Dense:
    """One dense model with named leaves.

    Attributes:
      given: the user's parameters or `State`.
      tree: the flattened parameters.
      outline: names, shapes and axes.
      optimizer: the optimizer state that the sparse model needs, or None.
      reader: reader of the leaves by our names.
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
          UserError: the rules do not fit the tree.
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
        # Only existing experts can have another axis order than ours.
        arrays = {name: _in_ours(leaf, outline.sources[name]) for name, leaf in arrays.items()}
        return cls(given, tree, outline, optimizer, MemoryReader(arrays, None if state is None else state.step))

    @property
    def params(self) -> Any:
        """The user's parameters."""
        return self.given.params if isinstance(self.given, State) else self.given


def plan_foreign(dense: Any, rules: PathRules, surgery: Surgery) -> Plan:
    """Plans `upcycle_foreign`, with the user's names; see `api.plan`."""
    models = _models(dense, rules, surgery)
    return _with_their_names(_plan(models, surgery), models[0].outline)


def upcycle_foreign(
    dense: Any, rules: PathRules, surgery: Surgery, *, key: jax.Array, mesh: Mesh | None, batch: Any
) -> tuple[Any, dict[str, Any]]:
    """Upcycles a foreign model; see `api.upcycle`."""
    if batch is not None and None in (rules.dense_apply, rules.sparse_apply):
        raise UserError('a batch needs `dense_apply` and `sparse_apply` in the rules, which are compared on it.')
    models = _models(dense, rules, surgery)
    first, outline = models[0], models[0].outline
    if batch is not None and len(models) > 1:
        raise UserError('a batch cannot be compared with several dense models: remove the batch.')
    hidden_states = None if batch is None else rules.hidden_states
    check_surgery(
        surgery,
        has_state=first.optimizer is not None,
        has_hidden=hidden_states is not None,
        way_out='pass a batch, and `hidden_states` in the rules',
    )

    plan = _plan(models, surgery)
    widths = {mlp_of(row.target): row.shape[0] for row in plan.rows if row.action is Action.ROUTER}

    def hidden(target: Mapping[str, jax.Array], mlp: str) -> np.ndarray:
        path = outline.theirs(mlp)
        return _checked_states(hidden_states(first.params, path, batch), path, widths[mlp])

    shardings = {row.target: _sharding(first, row.target, row.sources, mesh) for row in plan.rows}
    known = dataclasses.replace(plan, rows=tuple(row for row in plan.rows if row.action is not Action.NEW))
    shown = _with_their_names(plan, outline)
    made, receipt = carry_out(known, _reader(models), shardings, key, hidden=hidden, names=outline.theirs, shown=shown)
    leaves = {name: _in_theirs(leaf, outline.targets[name], mesh) for name, leaf in made.items()}
    params = first.tree.like(
        {outline.targets[name].name: leaf for name, leaf in leaves.items() if name.startswith(PARAMS)}
    )
    receipt['function_check'] = dict.fromkeys(('whole_model', 'layers'), 'not compared: no batch was given')
    if batch is not None:
        gap = function_gap(rules.dense_apply(first.params, batch), rules.sparse_apply(params, batch))
        receipt['function_check'] = {'whole_model': gap, 'layers': 'not compared: not our layers'}
    if first.optimizer is None:
        return params, receipt
    leaves |= _fresh(first, params, leaves, shardings, mesh)
    opt_state = first.optimizer.of(leaves)
    return dataclasses.replace(first.given, params=params, opt_state=opt_state), receipt


def _checked_states(states: Any, mlp: str, width: int) -> np.ndarray:
    """Returns hidden states as float32 (tokens, width).

    Raises:
      UserError: they have another shape, or contain NaN or infinity.
    """
    states = _numbers(states, f'hidden_states for {mlp}')
    if states.ndim < 2 or states.shape[-1] != width or not states.size:
        raise UserError(
            f'hidden_states for {mlp} returns an array of shape {states.shape}: it must be (tokens, {width}), the inputs of the '
            'router.'
        )
    _require_finite(states, f'hidden_states for {mlp}')
    return states.reshape(-1, width)


def _numbers(leaf: Any, name: str) -> np.ndarray:
    """Returns an output of the user's function `name` in float32.

    Raises:
      UserError: it is not a numeric array.
    """
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise UserError(f'{name} returns {leaf!r}: it must return numeric arrays.')
    return partitioning.whole_on_host(array).astype(np.float32)


def _require_finite(array: np.ndarray, name: str) -> None:
    if not np.isfinite(array).all():
        raise UserError(f'{name} returns NaN or infinity: fix the function or the batch.')


def function_gap(dense: Any, sparse: Any) -> dict[str, float]:
    """Measures the difference between the outputs of two models.

    Args:
      dense: output of the dense model, an array or a tree of arrays.
      sparse: output of the sparse model.

    Returns:
      `max_abs_difference`; `dense_rms`, the root mean square of the dense output; and `gap`, |sparse - dense| / |dense| (norms).

    Raises:
      UserError: the outputs differ in structure or shape, are not numeric, are empty, or contain NaN or infinity that
        the other does not.
    """
    outputs = {'dense_apply': dense, 'sparse_apply': sparse}
    outputs = {name: jax.tree.map(lambda leaf, name=name: _numbers(leaf, name), out) for name, out in outputs.items()}
    shapes = [jax.tree.map(np.shape, output) for output in outputs.values()]
    if shapes[0] != shapes[1]:
        raise UserError(
            f'dense_apply returns {shapes[0]} and sparse_apply {shapes[1]}: both must return the same shapes.'
        )
    none = np.zeros(0, np.float32)  # if a function returns no arrays
    x, y = (np.concatenate([none, *map(np.ravel, jax.tree.leaves(output))]) for output in outputs.values())
    if not x.size:
        raise UserError(f'dense_apply returns {dense!r}, without a number: it must return the outputs of the model.')
    masked = np.isinf(x) & (x == y)  # as the logits of padding
    x, y = np.where(masked, 0, x), np.where(masked, 0, y)
    _require_finite(x, 'dense_apply')
    _require_finite(y, 'sparse_apply')
    return {
        'max_abs_difference': float(np.abs(x - y).max()),
        'dense_rms': float(np.sqrt(np.mean(np.square(x)))),
        'gap': float(np.linalg.norm(x - y) / max(np.linalg.norm(x), 1e-30)),
    }


def _models(dense: Any, rules: PathRules, surgery: Surgery) -> list[_Dense]:
    """Names the leaves of one or several dense models."""
    if surgery.operator is None:
        raise UserError("path rules make experts, but the surgery has operator=None: use one, such as Surgery('copy').")
    models = dense if isinstance(dense, list | tuple) else [dense]
    if not models:
        raise UserError('the list of dense models is empty: pass at least one.')
    if len({isinstance(model, State) for model in models}) > 1:
        raise UserError(
            'some dense models are a `State` and others are not: pass all or none of them with an optimizer state.'
        )
    return [_Dense.of(model, rules, surgery) for model in models]


def _reader(models: list[_Dense]) -> MemoryReader | SeveralReader:
    return models[0].reader if len(models) == 1 else SeveralReader([model.reader for model in models])


def _plan(models: list[_Dense], surgery: Surgery) -> Plan:
    """Makes the plan, with our names.

    Raises:
      UserError: the plan fails.
    """
    outline = models[0].outline
    wanted = {name: target.leaf for name, target in outline.targets.items()}
    axes = {name: target.axes for name, target in outline.targets.items() if target.axes}
    try:
        plan = plan_surgery(_reader(models).leaves(), wanted, surgery, axes)
    except DifferentLeaves as error:
        names = sorted({*outline.targets, *outline.sources}, key=len, reverse=True)
        known = re.compile('|'.join(map(re.escape, names)))
        problems = [known.sub(lambda match: outline.theirs(match[0]), problem) for problem in error.problems]
        raise DifferentLeaves('The parameters do not fit the rules and the surgery', problems) from None
    # Fresh state is the optimizer's initial state, which may be nonzero.
    return dataclasses.replace(
        plan,
        rows=tuple(
            dataclasses.replace(row, action=Action.NEW)
            if row.action is Action.ZEROS and row.target.startswith('opt_state/') and not is_clock(row.target)
            else row
            for row in plan.rows
        ),
    )


def _with_their_names(plan: Plan, outline: Outline) -> Plan:
    """Converts a plan for display to the user's names and array shapes."""
    rows = []
    for row in plan.rows:
        target = outline.targets[row.target]
        sources = tuple(map(outline.theirs, row.sources))
        axes = target.in_theirs(row.axes) if row.axes else ()
        rows.append(dataclasses.replace(row, target=target.name, sources=sources, shape=target.shape, axes=axes))
    dropped = {outline.theirs(name): reason for name, reason in plan.dropped.items()}
    return dataclasses.replace(plan, rows=tuple(rows), dropped=dropped | outline.dropped)


def _in_ours(leaf: Any, source: Named) -> Any:
    """Transposes an array, or its shape, to our axes."""
    if not source.order:
        return leaf
    if not hasattr(leaf, 'transpose'):
        return source.leaf
    return leaf.transpose([source.order.index(axis) for axis in range(len(source.order))])


def _in_theirs(leaf: jax.Array, target: Named, mesh: Mesh | None) -> jax.Array:
    """Transposes an array to the user's axes, on the user's mesh, which may have other axis types."""
    sharding = _turned(leaf.sharding, target)
    if target.order:
        leaf = jax.jit(lambda leaf: leaf.transpose(target.order), out_shardings=sharding)(leaf)
    return leaf if mesh is None else jax.device_put(leaf, NamedSharding(mesh, sharding.spec))


def _turned(sharding: jax.sharding.Sharding, target: Named) -> jax.sharding.Sharding:
    """Transposes a sharding to the user's axes."""
    if not target.order or not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * (len(target.order) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*target.in_theirs(spec)))


def _sharding(dense: _Dense, name: str, sources: tuple[str, ...], mesh: Mesh | None) -> jax.sharding.Sharding:
    """The sharding of a leaf: its source's if on the same mesh, plus `expert` for experts; otherwise from its axes."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    auto = auto_mesh(mesh)
    target = dense.outline.targets[name]
    shape = target.leaf.shape
    spec = tuple(partitioning.mesh_axes(PartitionSpec(*(target.axes or (None,) * len(shape))), shape, auto))
    source = dense.outline.sources.get(without_index(sources[0])) if sources else None
    placed = None if source is None else getattr(dense.tree.leaves.get(source.name), 'sharding', None)
    on_mesh = isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh) and auto_mesh(placed.mesh) == auto
    if on_mesh and not source.order:
        theirs = (*placed.spec, *(None,) * (len(source.leaf.shape) - len(placed.spec)))
        inherited = (*spec[: len(shape) - len(theirs)], *theirs)
        if _is_valid(auto, inherited, shape):
            spec = inherited
    return NamedSharding(auto, PartitionSpec(*spec))


def _is_valid(mesh: Mesh, spec: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """True if a leaf can be sharded this way: evenly, and with no mesh axis used twice."""
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
    """Makes the leaves of the optimizer's initial state that the plan did not make, in the user's axes."""
    missing = {name: i for i, name in enumerate(dense.optimizer.names) if name not in made}
    places = {}
    for name in missing:
        sharding = _turned(shardings[name], dense.outline.targets[name])
        places[name] = sharding if mesh is None else NamedSharding(mesh, sharding.spec)

    def init(params: Any) -> dict[str, jax.Array]:
        leaves = jax.tree.leaves(dense.given.init(params))
        return {name: without_key_type(leaves[i]) for name, i in missing.items()}

    return jax.jit(init, out_shardings=places)(params) if missing else {}
