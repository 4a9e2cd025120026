"""The training step: loss, gradient, update."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from upcycle.models import Model
from upcycle.models.losses import summarize
from upcycle.moe import state as moe_state
from upcycle.training.optimizer import Optimizer
from upcycle.training.schedule import Schedule
from upcycle.training.trainable import NOTHING, Frozen

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """The state of training, as stored in a checkpoint.

    Attributes:
      step: int32, number of updates so far, including those of the dense run.
      params: nested dict of float32 arrays.
      opt_state: nested dict; see `training.optimizer`.
      rng: uint32 key data; step t uses fold_in(rng, t), so no other random state is stored.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Model,
    optimizer: Optimizer,
    learning_rate: Schedule,
    batch_axes: Any,
    num_microbatches: int = 1,
    frozen: Frozen = NOTHING,
    leaf_norms: bool = False,
) -> tuple[TrainState, Metrics]:
    """Makes one update, or none if the loss or the gradient is not finite. Pure; the trainer jits it.

    The loss is (sum of the targets' losses) / (the whole batch's normaliser) + the auxiliary losses of the MoE layers, so that
    microbatches do not change the gradient, except for random draws: each microbatch draws its own dropout, router noise and
    mixup.

    Args:
      state: before the step.
      batch: the global batch.
      model: computes the parts of the loss.
      optimizer: computes the update from the gradient.
      learning_rate: function of the step.
      batch_axes: number of leading axes of each parameter that the optimizer maps over.
      num_microbatches: number of equal parts of the batch, which are processed one after the other.
      frozen: parameters that are not trained.
      leaf_norms: also return the norm of every leaf of the gradient.

    Returns:
      The state after the step, and metrics: parts of the loss, accuracy, learning rate, norms, routing, and `skipped`: 1 if
      parameters and optimizer state are unchanged, else 0.
    """
    grads, sums = gradient(state, batch, model=model, num_microbatches=num_microbatches)
    grads = frozen.stop(moe_state.split(grads)[0], state.step)
    rate = learning_rate(state.step)
    old, router_state = moe_state.split(state.params)
    params, opt_state = optimizer.update(grads, state.opt_state, old, rate, batch_axes)
    params = frozen.restore(old, params, state.step)
    opt_state = frozen.restore(state.opt_state, opt_state, state.step)
    params = moe_state.follow(params, router_state, sums['moe'], model.moe_layers())
    metrics = summarize(sums, model.loss_normalizer(batch))
    metrics |= {
        'learning_rate': rate,
        'gradient_norm': global_norm(grads),
        'parameter_norm': global_norm(params),
    }
    if leaf_norms:
        metrics |= {f'gradient_norm/{name}': global_norm(leaf) for name, leaf in flatten_dict(grads, sep='/').items()}
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm'])
    params, opt_state = jax.tree.map(
        lambda new, before: jnp.where(finite, new, before), (params, opt_state), (state.params, state.opt_state)
    )
    metrics['skipped'] = 1.0 - finite
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def gradient(state: TrainState, batch: Batch, *, model: Model, num_microbatches: int = 1) -> tuple[Any, Metrics]:
    """Computes the gradient of the loss by all parameters, and the parts of the loss, summed over the batch."""
    normalizer = model.loss_normalizer(batch)
    step_rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def loss_fn(params: Any, microbatch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        sums, moe_loss, moe_metrics = model.forward(
            params, microbatch, rng, training=True, num_microbatches=num_microbatches
        )
        moe_loss, moe_metrics = jax.tree.map(lambda x: x / num_microbatches, (moe_loss, moe_metrics))
        return sums['loss'] / normalizer + moe_loss, {**sums, 'moe_loss': moe_loss, 'moe': moe_metrics}

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        return grad_fn(state.params, batch, step_rng)
    return _accumulate(grad_fn, state.params, batch, step_rng, num_microbatches)


def global_norm(tree: Any) -> jax.Array:
    """Computes the Euclidean norm over all leaves, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def _accumulate(grad_fn, params: Any, batch: Batch, rng: jax.Array, parts: int) -> tuple[Any, Metrics]:
    """Sums gradients and metrics over microbatches.

    A microbatch is a range of rows of the batch, so that its routing groups are groups of the batch. A device also holds a range
    of rows, so most rows are needed on another device: each step moves the batch's inputs between devices once, before the scan.
    Microbatches of strided rows would need no move, but would change the groups.
    """

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
        return nn.with_logical_constraint(x, (None, 'batch', *(None,) * (x.ndim - 2)))

    split = jax.tree.map(cut, batch)

    def body(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        microbatch, index = part
        new = grad_fn(params, microbatch, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, total, new), None

    first = jax.tree.map(lambda x: x[0], split)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, params, first, rng))
    total, _ = jax.lax.scan(body, zeros, (split, jnp.arange(parts)))
    return total
