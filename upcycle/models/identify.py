"""Identifies the model of a checkpoint from the names and shapes of its leaves, and checks that it is complete."""

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from upcycle import partitioning, schema
from upcycle.errors import DifferentLeaves, UserError
from upcycle.models import Model, registry

Leaves = Mapping[str, jax.ShapeDtypeStruct]

_IN_MOE_LAYER = re.compile(r'(params(?:/.+?)?)/(?:expert|router|shared|shared_gate|router_state|mixing)(?:/|$)')


def facts_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts in a checkpoint's metadata: fields of the model's configuration that shapes do not tell."""
    if 'facts' in metadata:
        return dict(metadata['facts'])
    config = metadata.get('model', {}).get('config', {})
    if not isinstance(config, Mapping):
        raise UserError(f"the checkpoint's metadata is damaged: its model is {schema.shown(config)}.")
    known = {fact for kind in registry.families() for fact in kind.facts}
    return {name: value for name, value in config.items() if name in known}


def facts_in(path: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts that the names of a checkpoint's leaves tell; see `facts_of`.

    Raises:
      UserError: no model of its family has such leaves.
    """
    names = _params(leaves)
    kind = _kind_of(names)
    return {} if kind is None else kind.facts_in(path, names)


def _params(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters among the leaves, by their names without `params/`."""
    return {name.removeprefix('params/'): leaf for name, leaf in leaves.items() if name.startswith('params/')}


def _kind_of(names: Collection[str]) -> type[Model] | None:
    """Returns the family of a model with parameters of these names; None if unknown."""
    return next((kind for kind in registry.families() if kind.telltale in names), None)


def different_function(model: Model, facts: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """Returns the facts of a checkpoint that differ from the model; see `require_function`."""
    theirs = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    return {
        name: value
        for name, value in theirs.items()
        if name not in ignored and getattr(model.config, name, value) != value
    }


def require_function(path: str, model: Model, facts: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
    """Compares a model with the facts of a checkpoint.

    Args:
      path: of the checkpoint, for messages.
      model: to be compared.
      facts: see `facts_of`.
      ignored: fields that may differ.

    Raises:
      UserError: the model computes another function; the message names the bindings that fit.
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
    """Returns the dense model of a checkpoint, or the one that it was upcycled from.

    Args:
      path: of the checkpoint, for messages.
      leaves: of the checkpoint; an MoE layer's width is that of an expert.
      facts: fields of the configuration that shapes do not tell.

    Raises:
      UserError: the family is unknown, or the model is incomplete.
    """
    params = {name: tuple(leaf.shape) for name, leaf in _params(leaves).items()}
    kind = _kind_of(params)
    if kind is None:
        known = ' nor '.join(f'a {kind.title} (no {kind.telltale})' for kind in registry.families())
        raise UserError(f'{path} holds neither {known}.')
    try:
        return kind.from_leaves(path, params, kind.facts_in(path, params) | dict(facts or {}))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f'{path} is not a complete model: {error.args[0]} is missing or has another shape.') from error


def check(path: str, leaves: Leaves, facts: Mapping[str, Any] | None = None) -> Model:
    """Identifies the dense model of a checkpoint and compares all leaves with it.

    MoE layers are only checked for consistency, since their contents depend on operators.

    Raises:
      UserError: leaves are missing, unknown or have another shape; all are listed.
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
            problems.append(f'{name} {shape} is unknown')
        elif shape != expected[name]:
            problems.append(f'{name} is {shape}, but must be {expected[name]} to fit the other leaves')
    problems += [problem for layer in sparse for problem in _layer_problems(layer, stored)]
    problems += _state_problems(leaves, stored)
    if problems:
        raise DifferentLeaves(f'{path} is not a complete {model.family}', problems)
    return model


@functools.lru_cache(maxsize=16)
def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters by their names in a checkpoint."""
    spec = model.smallest_batch()
    params = partitioning.unbox(jax.eval_shape(lambda key: model.init(key, spec), jax.random.key(0)))
    return {'params/' + name: tuple(leaf.shape) for name, leaf in flatten_dict(params, sep='/').items()}


def moe_layers(leaves: Mapping[str, Any]) -> list[str]:
    """Returns the paths of the MoE layers, 'params/encoder/layers_1/mlp', in the order of the checkpoint."""
    return list(dict.fromkeys(match[1] for name in leaves if (match := _IN_MOE_LAYER.match(name))))


def _layer_problems(layer: str, stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    experts = {name: shape for name, shape in stored.items() if name.startswith(f'{layer}/expert/')}
    # A merged layer has one coefficient for each expert instead of a router.
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
            problems.append(f'{name} is optimizer state of an unknown parameter')
            continue
        without_one = [shape[:axis] + shape[axis + 1 :] for axis in range(len(shape))]
        if tuple(leaf.shape) not in (without_one if slot in ('v_row', 'v_col') else [shape]):
            problems.append(f'{name} is {tuple(leaf.shape)}, but its parameter is {shape}')
    return problems
