"""What is not finite in a step that was skipped. Off the fast path: the step's gradient is computed once more."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from upcycle.models import Model
from upcycle.models.losses import summarize
from upcycle.train.step import Batch, TrainState, gradient
from upcycle.train.trainable import Frozen

_SHOWN = 3


def diagnose(state: TrainState, batch: Batch, *, model: Model, num_microbatches: int, frozen: Frozen) -> str:
    """Says in a clause what is not finite, causes before effects: the batch, parameters, the loss, leaves of the gradient.

    Args:
      state: before the step.
      batch: of the step.
      model, num_microbatches, frozen: as `train_step` takes them.
    """
    look = jax.jit(functools.partial(_look, model=model, num_microbatches=num_microbatches, frozen=frozen))
    found = jax.device_get(look(state, batch))
    for what, broken in (('the batch holds', found['batch']), ('before the step, parameters hold', found['params'])):
        if names := [name for name, count in broken.items() if count]:
            return f'{what} NaN or infinity in {_listed(names)}'
    loss = f'the loss is {found["loss"]:.4g}'
    gradients, largest = found['gradient'], found['largest']
    names = [name for name, count in gradients.items() if count]
    if 0 < len(names) < len(gradients):
        return (
            f'{loss} and {len(names)} of {len(gradients)} leaves of the gradient hold NaN or infinity, nearest to the loss '
            f'{max(names, key=_depth)}'
        )
    if names or not np.isfinite(found['loss']):
        weights = found['params_largest']
        name = max(weights, key=weights.get)
        return (
            f'{loss} and {"no" if names else "every"} leaf of the gradient is finite, with a finite batch and finite parameters, '
            f'whose largest number is {weights[name]:.4g}, in {name}'
        )
    name = max(largest, key=largest.get)
    return f'{loss} and the norm of the gradient overflows, whose largest number is {largest[name]:.4g}, in {name}'


def _look(state: TrainState, batch: Batch, *, model: Model, num_microbatches: int, frozen: Frozen) -> dict[str, Any]:
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


def _depth(name: str) -> tuple[bool, int]:
    """Where in the network a leaf is: the decoder after the encoder, and layers by their numbers."""
    number = re.search(r'\d+', name)
    return 'decoder' in name, int(number[0]) if number else -1


def _not_finite(array: jax.Array) -> jax.Array:
    if not jnp.issubdtype(array.dtype, np.inexact):
        return jnp.zeros((), jnp.int32)
    return (~jnp.isfinite(array)).sum()


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ', '.join(names[:_SHOWN]) + (f' and {more} more' if more > 0 else '')
