"""Diagnosis of a step that was not finite, from its gradient, which is computed again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from upcycle.models import Model
from upcycle.models.losses import summarize
from upcycle.training.step import Batch, TrainState, gradient
from upcycle.training.trainable import Frozen

_SHOWN = 3


def diagnose(
    state: TrainState,
    batch: Batch,
    *,
    model: Model,
    num_microbatches: int,
    frozen: Frozen,
    when: str = 'before the step',
) -> str:
    """Returns a clause that names what is not finite, causes first: the batch, parameters, the loss, leaves of the gradient.

    Args:
      state: with the parameters and the step's number.
      batch: of the step.
      model, num_microbatches, frozen: as in `train_step`.
      when: the point in time of the parameters, in words.
    """
    inspect = jax.jit(functools.partial(_inspect, model=model, num_microbatches=num_microbatches, frozen=frozen))
    report = jax.device_get(inspect(state, batch))
    for clause, broken in (('the batch holds', report['batch']), (f'{when}, parameters hold', report['params'])):
        if names := [name for name, count in broken.items() if count]:
            return f'{clause} NaN or infinity in {_listed(names)}'
    loss = f'the loss is {report["loss"]:.4g}'
    gradients, largest = report['gradient'], report['largest']
    names = [name for name, count in gradients.items() if count]
    if 0 < len(names) < len(gradients):
        return (
            f'{loss} and {len(names)} of {len(gradients)} leaves of the gradient hold NaN or infinity, nearest to the loss '
            f'{max(names, key=_forward_order(model, batch).index)}'
        )
    if names or not np.isfinite(report['loss']):
        weights = report['params_largest']
        name = max(weights, key=weights.get)
        return (
            f'{loss} and {"no" if names else "every"} leaf of the gradient is finite, with a finite batch and finite parameters, '
            f'whose largest number is {weights[name]:.4g}, in {name}'
        )
    name = max(largest, key=largest.get)
    return f'{loss} and the norm of the gradient overflows, whose largest number is {largest[name]:.4g}, in {name}'


def _inspect(state: TrainState, batch: Batch, *, model: Model, num_microbatches: int, frozen: Frozen) -> dict[str, Any]:
    grads, sums = gradient(state, batch, model=model, num_microbatches=num_microbatches)
    leaves = flatten_dict({'params': frozen.stop(grads, state.step)}, sep='/')
    params = flatten_dict({'params': state.params}, sep='/')
    return {
        'batch': {name: _not_finite(array) for name, array in batch.items()},
        'params': {name: _not_finite(leaf) for name, leaf in params.items()},
        'loss': summarize(sums, model.loss_normalizer(batch))['loss'],
        'gradient': {name: _not_finite(leaf) for name, leaf in leaves.items()},
        'largest': {name: jnp.abs(leaf).max() for name, leaf in leaves.items()},
        'params_largest': {name: jnp.abs(leaf).max() for name, leaf in params.items()},
    }


def _forward_order(model: Model, batch: Batch) -> list[str]:
    """Returns the names of the parameters in the order of the forward pass, in which Flax creates them."""
    names: list[str] = []

    def init(key: jax.Array) -> None:
        # Not from the result: JAX sorts the keys of a traced function's result.
        boxed = model.init(key, {name: (array.shape, array.dtype) for name, array in batch.items()})
        names.extend(flatten_dict({'params': boxed}, sep='/'))

    jax.eval_shape(init, jax.random.key(0))
    return names


def _not_finite(array: jax.Array) -> jax.Array:
    if not jnp.issubdtype(array.dtype, np.inexact):
        return jnp.zeros((), jnp.int32)
    return (~jnp.isfinite(array)).sum()


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ', '.join(names[:_SHOWN]) + (f' and {more} more' if more > 0 else '')
