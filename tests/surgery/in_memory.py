"""Surgery on parameters in memory, by the real plan and executor."""

import functools
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.moe.quick import random_params
from tests.small import module_inputs, spec_of
from upcycle import partitioning
from upcycle.models import Model
from upcycle.surgery.place import execute
from upcycle.surgery.plan import Plan, Surgery
from upcycle.surgery.planning import plan_surgery

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def abstract(model: Model, batch: Any) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str | None, ...]]]:
    """Shapes and logical axes of a model's parameters, by their names in a checkpoint."""
    shapes, axes = _abstract(model, tuple(spec_of(batch).items()))
    return dict(shapes), dict(axes)


@functools.cache
def _abstract(model: Model, spec: tuple[tuple[str, Any], ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    boxed = jax.eval_shape(lambda key: model.init(key, dict(spec)), jax.random.key(0))
    shapes = flatten_dict({'params': partitioning.unbox(boxed)}, sep='/')
    axes = flatten_dict({'params': partitioning.logical_axes(boxed)}, sep='/')
    return shapes, {name: tuple(spec) for name, spec in axes.items()}


def leaves_of(source: Any, **more: Any) -> dict[str, jax.Array]:
    """The leaves of one model's parameters (and `more` of its state), or of several models', by their names for a plan."""
    if isinstance(source, list):
        return {f'{name}@{i}': leaf for i, one in enumerate(source) for name, leaf in leaves_of(one).items()}
    return flatten_dict({'params': source, **more}, sep='/')


def plan_for(model: Model, source: Any, spec: Surgery, batch: Any) -> Plan:
    """The plan from the parameters of one or several models."""
    shapes, axes = abstract(model, batch)
    flat = leaves_of(source)
    return plan_surgery(
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}, shapes, spec, axes
    )


def upcycle(model: Model, source: Any, spec: Surgery, batch: Any, **more: Any) -> Any:
    """The model's parameters, made from one or several models."""
    flat = leaves_of(source)
    plan = plan_for(model, source, spec, batch)
    shardings = dict.fromkeys((row.target for row in plan.rows), ONE)
    made = execute(plan, lambda name, sharding: flat[name], shardings, new={}, **more)
    return unflatten_dict(made, sep='/')['params']


def params_of(model: Model, batch: Any, seed: int = 0) -> Any:
    """Nonzero parameters of a model. Biases and a ViT's head start at 0, which would hide mistakes."""
    return random_params(model.module(), **module_inputs(batch), seed=seed)
