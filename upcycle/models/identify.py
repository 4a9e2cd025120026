"""Which model a checkpoint holds, from the names and shapes of its leaves: what import, export and conversion check first."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax

from upcycle import partitioning, schema
from upcycle.errors import DifferentLeaves, UserError
from upcycle.models import Model, registry

Leaves = Mapping[str, jax.ShapeDtypeStruct]

_MOE_SEGMENTS = ('expert', 'router', 'shared', 'router_state', 'mixing')


def facts_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's metadata says of the model, by the fields of our configurations."""
    if 'facts' in metadata:
        return dict(metadata['facts'])
    config = metadata.get('model', {}).get('config', {})
    if not isinstance(config, Mapping):
        raise UserError(f'the metadata of the checkpoint is damaged: its model is {schema.shown(config)}.')
    return {name: config[name] for name in _facts_known(metadata.get('family')) if name in config}


def _facts_known(family: Any) -> tuple[str, ...]:
    """The facts of a family, or of all where it is unknown."""
    known = isinstance(family, str) and family in registry.FAMILIES
    kinds = [registry.family(family)] if known else registry.families()
    return tuple(dict.fromkeys(fact for kind in kinds for fact in kind.facts))


def facts_in(path: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What the names of a checkpoint's leaves say of the model, by the fields of our configurations.

    Raises:
      UserError: no model of its family has such leaves.
    """
    names = _params(leaves)
    kind = _kind_of(names)
    return {} if kind is None else kind.facts_in(path, names)


def _params(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters among the leaves, by their names without `params/`."""
    return {name.removeprefix('params/'): leaf for name, leaf in leaves.items() if name.startswith('params/')}


def _kind_of(names: Collection[str]) -> type[Model] | None:
    """The family of the model that has parameters of these names."""
    return next((kind for kind in registry.families() if kind.telltale in names), None)


def different_function(model: Model, facts: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """What a checkpoint says of itself and the model has otherwise; see `require_function`."""
    theirs = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    return {
        name: value
        for name, value in theirs.items()
        if name not in ignored and getattr(model.config, name, value) != value
    }


def require_function(path: str, model: Model, facts: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
    """Compares a model with what a checkpoint says of itself.

    Args:
      path: of the checkpoint, for messages.
      model: the model.
      facts: see `facts_of`.
      ignored: fields that may differ.

    Raises:
      UserError: the model computes another function; the bindings that would fit are named.
    """
    if different := different_function(model, facts, ignored):
        listing = '; '.join(
            f'{name} = {schema.shown(value)}, and the model has {schema.shown(getattr(model.config, name))}'
            for name, value in different.items()
        )
        bindings = ', '.join(f'{name.upper()} = {schema.shown(value)}' for name, value in different.items())
        fit = model.files_that_fit(facts)
        files = f', as {fit} and its other sizes do' if fit else ''
        raise UserError(f'{path} was made with {listing}: set it in the gin files ({bindings}{files}).')


def dense_model(path: str, leaves: Leaves, facts: Mapping[str, Any] | None = None) -> Model:
    """The dense model that a checkpoint holds, or was upcycled from.

    Args:
      path: of the checkpoint, for messages.
      leaves: its leaves; of MoE layers the width is read off an expert.
      facts: fields of the configuration that shapes do not tell.

    Raises:
      UserError: it is a model of no family that we know, or is not whole.
    """
    found = {name: tuple(leaf.shape) for name, leaf in _params(leaves).items()}
    kind = _kind_of(found)
    if kind is None:
        known = ' nor '.join(f'a {kind.title} (no {kind.telltale})' for kind in registry.families())
        raise UserError(f'{path} holds neither {known}.')
    try:
        return kind.from_leaves(path, found, kind.facts_in(path, found) | dict(facts or {}))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f'{path} is not a whole model: {error.args[0]} is missing or has another shape.') from error


def check(path: str, leaves: Leaves, facts: Mapping[str, Any] | None = None) -> Model:
    """The dense model of a checkpoint, after its leaves have been compared with that model's.

    MoE layers are only compared among themselves: what they hold is the operators' business.

    Raises:
      UserError: leaves are missing, of another shape, or belong to nothing; all are listed.
    """
    model = dense_model(path, leaves, facts)
    expected = shapes(model)
    sparse = moe_layers(leaves)
    inside = tuple(f'{layer}/' for layer in sparse)
    expected = {name: shape for name, shape in expected.items() if not name.startswith(inside)}
    for part in (f'params/{part}/' for part in model.lacking):
        if not any(name.startswith(part) for name in leaves):
            expected = {name: shape for name, shape in expected.items() if not name.startswith(part)}
    stored = {name: tuple(leaf.shape) for name, leaf in leaves.items() if name.startswith('params/')}
    problems = [f'{name} {shape} is missing' for name, shape in expected.items() if name not in stored]
    for name, shape in stored.items():
        if name.startswith(inside):
            continue
        if name not in expected:
            problems.append(f'{name} {shape} belongs to nothing')
        elif shape != expected[name]:
            problems.append(f'{name} is {shape}, and the other leaves ask for {expected[name]}')
    problems += [problem for layer in sparse for problem in _layer_problems(layer, stored)]
    problems += _state_problems(leaves, stored)
    if problems:
        raise DifferentLeaves(f'{path} is not a whole {model.family}', problems)
    return model


@functools.lru_cache(maxsize=16)
def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters by their names in a checkpoint."""
    spec = model.smallest_batch()
    params = partitioning.unbox(jax.eval_shape(lambda key: model.init(key, spec), jax.random.key(0)))
    return {'params/' + name: tuple(leaf.shape) for name, leaf in _flat(params).items()}


def moe_layers(leaves: Mapping[str, Any]) -> list[str]:
    """Paths of the MoE layers, 'params/encoder/layers_1/mlp', in the order of the checkpoint."""
    return list(dict.fromkeys(_layer_of(name) for name in leaves if name.startswith('params/') and _is_moe(name)))


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, node in tree.items():
        flat |= _flat(node, f'{prefix}{key}/') if isinstance(node, Mapping) else {prefix + key: node}
    return flat


def _is_moe(name: str) -> bool:
    return any(segment in _MOE_SEGMENTS for segment in name.split('/'))


def _layer_of(name: str) -> str:
    segments = name.split('/')
    return '/'.join(segments[: min(segments.index(s) for s in _MOE_SEGMENTS if s in segments)])


def _layer_problems(layer: str, stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    experts = {name: shape for name, shape in stored.items() if name.startswith(f'{layer}/expert/')}
    # A layer that is merged has one number an expert in place of a router.
    routing = (f'{layer}/router/', f'{layer}/mixing')
    routers = {name: shape for name, shape in stored.items() if name.startswith(routing) and shape}
    if not experts or not routers:
        return [f'{layer} has no {"experts" if not experts else "router"}']
    counts = {shape[0] if shape else 0 for shape in experts.values()}
    if len(counts) > 1:
        return [f'{layer}/expert holds {" and ".join(map(str, sorted(counts)))} experts']
    (count,) = counts
    # Soft MoE has a column for each slot of an expert.
    return [f'{name} {shape} does not route to {count} experts' for name, shape in routers.items() if shape[-1] % count]


def _state_problems(leaves: Leaves, stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = []
    for name, leaf in leaves.items():
        if not name.startswith('opt_state/param_states/'):
            continue
        owner, _, slot = name.removeprefix('opt_state/param_states/').rpartition('/')
        shape = stored.get(f'params/{owner}')
        if shape is None:
            problems.append(f'{name} is the state of no parameter')
            continue
        without_one = [shape[:axis] + shape[axis + 1 :] for axis in range(len(shape))]
        if tuple(leaf.shape) not in (without_one if slot in ('v_row', 'v_col') else [shape]):
            problems.append(f'{name} is {tuple(leaf.shape)}, and its parameter is {shape}')
    return problems
