"""The MoE layer as a Flax module. Parameters: `router/router_weights/w/kernel` (D, E) and `expert/...` with E in front."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle.errors import UserError
from upcycle.moe.config import MoEConfig, capacity, num_groups
from upcycle.moe.dispatch import combine, dispatch
from upcycle.moe.router import route

# The variable collection that one layer's routing metrics are written to.
METRICS = 'moe_metrics'


class RouterWeights(nn.Module):
    """Logits of a linear router in float32, without bias; named as in flaxformer."""

    num_experts: int
    init_stddev: float

    @nn.compact
    def __call__(self, x_GxSxD: jax.Array) -> jax.Array:
        return nn.Dense(
            self.num_experts,
            use_bias=False,
            dtype=jnp.float32,
            kernel_init=nn.with_logical_partitioning(nn.initializers.normal(self.init_stddev), ('embed', 'unmodeled')),
            name='w',
        )(x_GxSxD)


class Router(nn.Module):
    """Jitter, then linear logits: (G, S, D) -> (G, S, E), in float32."""

    config: MoEConfig

    @nn.compact
    def __call__(self, x_GxSxD: jax.Array, *, training: bool) -> jax.Array:
        x_GxSxD = x_GxSxD.astype(jnp.float32)
        jitter = self.config.jitter_noise
        if training and jitter > 0:
            x_GxSxD *= jax.random.uniform(
                self.make_rng('jitter'), x_GxSxD.shape, minval=1.0 - jitter, maxval=1.0 + jitter
            )
        return RouterWeights(self.config.num_experts, self.config.router_init_stddev, name='router_weights')(x_GxSxD)


class MoELayer(nn.Module):
    """A dense MLP's replacement: the same MLP, E times, each on the tokens that the router sends it.

    Attributes:
      config: router, capacity and conventions.
      expert: the class of the dense MLP; it is mapped over a leading expert axis, so an expert *is* the dense MLP.
      expert_arguments: its constructor's arguments.
    """

    config: MoEConfig
    expert: type[nn.Module]
    expert_arguments: Mapping[str, Any]

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, real_BxL: jax.Array, *, training: bool, decoding: bool = False) -> jax.Array:
        """Applies the layer.

        Args:
          x_BxLxD: tokens, flattened to (B * L) and cut into contiguous groups.
          real_BxL: bool, False at padding.
          training: selects the capacity factor, and turns jitter and expert dropout on.
          decoding: one position at a time against a cache; dropless, since a batch of single tokens has no length to average
            the load over.

        Returns:
          (B, L, D) in the dtype of the input; 0 for a token that no expert took.

        Raises:
          UserError: the tokens cannot be cut into the groups asked for.
        """
        config = self.config
        B, L, D = x_BxLxD.shape
        E = config.num_experts
        if decoding:
            G, C = 1, B * L
        else:
            G = _groups(config, B * L)
            C = capacity(config, B * L // G, training=training)
        S = B * L // G
        x_GxSxD = x_BxLxD.reshape(G, S, D)
        logits_GxSxE = Router(config, name='router')(x_GxSxD, training=training)
        routing, metrics = route(logits_GxSxE, real_BxL.reshape(G, S), config, C)
        for name, value in metrics.items():
            self.sow(METRICS, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        self.sow('intermediates', 'routing', routing)

        x_GxExCxD = dispatch(x_GxSxD, routing, config.dispatch)
        x_ExGCxD = x_GxExCxD.swapaxes(0, 1).reshape(E, G * C, D)
        experts = nn.vmap(
            self.expert,
            in_axes=(0, None),
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            axis_size=E,
            metadata_params={nn.PARTITION_NAME: 'expert'},
        )
        y_ExGCxD = experts(**self.expert_arguments, name='expert')(x_ExGCxD, training)
        y_GxExCxD = y_ExGCxD.reshape(E, G, C, D).swapaxes(0, 1)
        return combine(y_GxExCxD, routing, S, config.dispatch).reshape(B, L, D)


def _groups(config: MoEConfig, num_tokens: int) -> int:
    """Groups in this microbatch: those of the whole batch, cut at group boundaries."""
    microbatches = config.num_microbatches
    whole = num_groups(num_tokens * microbatches, config.group_size, config.groups_multiple_of)
    if whole % microbatches:
        raise UserError(
            f'NUM_MICROBATCHES = {microbatches} would cut a routing group in two, since the batch has {whole} groups of '
            f'{num_tokens * microbatches // whole} tokens: set GROUPS_MULTIPLE_OF to a multiple of {microbatches}.'
        )
    return whole // microbatches
