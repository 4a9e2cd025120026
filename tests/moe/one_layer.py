"""A norm and an MoE layer as a whole model, whose training step compiles in seconds."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.moe.quick import jit
from tests.small import init
from upcycle.models.layers import LayerNorm, MlpBlock
from upcycle.moe import state as moe_state
from upcycle.moe.layer import METRICS, MoELayer, moe_metrics
from upcycle.moe.routers.base import MoE
from upcycle.training.step import TrainState, train_step

B, L, D, F = 4, 8, 16, 32
MLP = 'layers_0/mlp'
BATCH = {'x': jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)}


class _Block(nn.Module):
    config: MoE

    @nn.compact
    def __call__(self, x_BxLxD, real_BxL, training):
        x_BxLxD = LayerNorm(dtype=jnp.float32, name='norm')(x_BxLxD)
        layer = MoELayer(self.config, MlpBlock, {'mlp_dim': F, 'dtype': jnp.float32}, name='mlp')
        return layer(x_BxLxD, real_BxL, training=training)


class _Stack(nn.Module):
    config: MoE

    @nn.compact
    def __call__(self, x_BxLxD, real_BxL, training):
        return _Block(self.config, name='layers_0')(x_BxLxD, real_BxL, training)


@dataclasses.dataclass(frozen=True)
class OneLayer:
    """See `upcycle.models.Model`; it learns to repeat its input. The last two tokens of odd rows are padding."""

    moe: MoE

    def init(self, rng, batch_spec):
        """Fresh parameters, boxed."""
        x_BxLxD = jnp.zeros(batch_spec['x'][0])
        return _Stack(self.moe).init(rng, x_BxLxD, jnp.ones(x_BxLxD.shape[:2], bool), True)['params']

    def moe_layers(self):
        """One."""
        return {MLP: self.moe}

    def loss_normalizer(self, batch):
        """Numbers."""
        return jnp.asarray(batch['x'].size, jnp.float32)

    def forward(self, params, batch, rng, *, training, num_microbatches=1):
        """Sums, auxiliary loss and metrics."""
        x_BxLxD = batch['x']
        real_BxL = jnp.ones(x_BxLxD.shape[:2], bool).at[1::2, -2:].set(False)
        module = _Stack(dataclasses.replace(self.moe, num_microbatches=num_microbatches))
        y_BxLxD, written = module.apply({'params': params}, x_BxLxD, real_BxL, training, mutable=[METRICS])
        sums = {'loss': jnp.square(y_BxLxD - x_BxLxD).sum(), 'z_loss': 0.0, 'correct': 0.0, 'weight': 1.0}
        metrics = moe_metrics(written[METRICS])
        return sums, metrics['experts/auxiliary_loss'], metrics


@functools.cache
def _started(model):
    return init(model, BATCH)


@functools.cache
def _step(model, optimizer, microbatches, frozen):
    axes = _started(model)[1]
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        learning_rate=lambda step: jnp.asarray(0.01),
        batch_axes=moe_state.split(axes)[0],
        num_microbatches=microbatches,
        **({} if frozen is None else {'frozen': frozen}),
    )
    return jit(step)


def start(model, optimizer, change=lambda params: params, step=1):
    """The state before training."""
    params, axes = _started(model)
    params = change(params)
    trained, axes = moe_state.split(params)[0], moe_state.split(axes)[0]
    key = jax.random.key_data(jax.random.key(0))
    return TrainState(jnp.asarray(step), params, optimizer.init(trained, axes), key)


def train(model, optimizer, state, steps=1, microbatches=1, frozen=None):
    """The state after some steps, and the last metrics."""
    for _ in range(steps):
        state, metrics = _step(model, optimizer, microbatches, frozen)(state, BATCH)
    return state, metrics
