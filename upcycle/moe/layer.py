"""The MoE layer as a Flax module. Parameters: `router/router_weights/w/kernel` (D, E) and `expert/...` with E in front."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh

from upcycle import partitioning
from upcycle.errors import UserError
from upcycle.moe import exchange, ragged
from upcycle.moe.config import (
    BalanceLoss,
    Dispatch,
    MoEConfig,
    RouterType,
    capacity,
    check_groups,
    microbatch_groups,
)
from upcycle.moe.router import Choices, importance_load_loss, route_dropless

# The variable collection that one layer's routing metrics are written to.
METRICS = 'moe_metrics'


class RouterWeights(nn.Module):
    """Logits of a linear router in float32, without bias; named as in flaxformer."""

    num_experts: int
    init_stddev: float

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        return nn.Dense(
            self.num_experts,
            use_bias=False,
            dtype=jnp.float32,
            kernel_init=nn.with_logical_partitioning(nn.initializers.normal(self.init_stddev), ('embed', 'unmodeled')),
            name='w',
        )(x_BxLxD)


class Router(nn.Module):
    """Jitter, then linear logits: (B, L, D) -> (B, L, E), in float32."""

    config: MoEConfig

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, *, training: bool) -> jax.Array:
        x_BxLxD = x_BxLxD.astype(jnp.float32)
        jitter = self.config.jitter_noise
        if training and jitter > 0:
            x_BxLxD *= jax.random.uniform(
                self.make_rng('jitter'), x_BxLxD.shape, minval=1.0 - jitter, maxval=1.0 + jitter
            )
        return RouterWeights(self.config.num_experts, self.config.router_init_stddev, name='router_weights')(x_BxLxD)


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
          UserError: the tokens cannot be cut into the groups asked for, or the groups not dealt out to the mesh.
        """
        config = self.config
        B, L, D = x_BxLxD.shape
        mesh = partitioning.current_mesh()
        shards = partitioning.batch_shards(mesh)
        if decoding:
            # Nothing is dropped, so groups do not matter; a batch that does not divide is left to the compiler.
            G = shards if B % shards == 0 else 1
            C = B * L // G
            mesh = mesh if B % shards == 0 else None
        else:
            G = microbatch_groups(config, B * L)
            C = capacity(config, B * L // G, training=training)
            check_groups(G, shards)
        clean_BxLxE = logits_BxLxE = Router(config, name='router')(x_BxLxD, training=training)
        if training and config.gate_noise > 0:
            noise_BxLxE = jax.random.normal(self.make_rng('jitter'), logits_BxLxE.shape)
            logits_BxLxE = logits_BxLxE + config.gate_noise / config.num_experts * noise_BxLxE
        balance = None
        if config.router is RouterType.TOP_K and config.balance_loss is BalanceLoss.IMPORTANCE_LOAD:
            by_group = (x.reshape(G, -1, *x.shape[2:]) for x in (clean_BxLxE, logits_BxLxE, real_BxL))
            balance = importance_load_loss(*by_group, config)
        if config.dispatch is Dispatch.RAGGED and not self.is_initializing():
            return self._dropless(x_BxLxD, logits_BxLxE, real_BxL, G, training, mesh, balance)

        x_ExGxCxD, routing, metrics = exchange.send(x_BxLxD, logits_BxLxE, real_BxL, config, G, C, mesh)
        self._log(metrics, routing, balance)
        experts = nn.vmap(
            self.expert,
            in_axes=(0, None),
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            axis_size=config.num_experts,
            metadata_params={nn.PARTITION_NAME: 'expert'},
        )
        x_ExNxD = x_ExGxCxD.reshape(config.num_experts, G * C, D)
        y_ExNxD = experts(**self.expert_arguments, name='expert')(x_ExNxD, training)
        return exchange.receive(y_ExNxD.reshape(x_ExGxCxD.shape), routing, (B, L, D), config, mesh)

    def _dropless(
        self,
        x_BxLxD: jax.Array,
        logits_BxLxE: jax.Array,
        real_BxL: jax.Array,
        groups: int,
        training: bool,
        mesh: AbstractMesh | None,
        balance: jax.Array | None,
    ) -> jax.Array:
        B, L, _ = x_BxLxD.shape
        E = self.config.num_experts
        if training and mesh is not None and self.expert_arguments.get('dropout_rate', 0.0) > 0:
            raise UserError(
                "DISPATCH = 'ragged' on several devices would draw an expert dropout that depends on the mesh: set "
                "EXPERT_DROPOUT_RATE = 0, or use 'gather'."
            )
        # Groups only matter to the balance loss, which is a mean over them; routing is token by token.
        choices, metrics = route_dropless(
            logits_BxLxE.reshape(groups, -1, E), real_BxL.reshape(groups, -1), self.config
        )
        self._log(metrics, choices, balance)
        K = self.config.num_selected_experts
        choices = Choices(*(x.reshape(B, L, K) for x in choices))
        rngs = {'dropout': self.make_rng('dropout')} if self.has_rng('dropout') else {}

        def experts(params: Any, x_RxD: jax.Array, sizes_E: jax.Array) -> jax.Array:
            module = self.expert(**self.expert_arguments, parent=None)
            return module.apply({'params': params}, x_RxD, training, group_sizes=sizes_E, rngs=rngs)

        params = self.get_variable('params', 'expert')
        return ragged.apply_experts(experts, params, x_BxLxD, choices, self.config, mesh)

    def _log(self, metrics: dict[str, jax.Array], routing: Any, balance: jax.Array | None) -> None:
        if balance is not None:
            metrics = metrics | {'auxiliary_loss': balance}
        for name, value in metrics.items():
            self.sow(METRICS, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        self.sow('intermediates', 'routing', routing)


def moe_metrics(written: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Routing metrics under the names of the log: the mean over all MoE layers, and each layer's own.

    Args:
      written: the collection `METRICS` of a model.

    The mean of `auxiliary_loss` counts Expert Choice layers as 0, as flaxformer's does.
    """
    by_layer: dict[str, dict[str, jax.Array]] = {}
    for (*layer, _, name), value in flatten_dict(dict(written)).items():
        by_layer.setdefault(name, {})['/'.join(layer)] = value
    metrics = {}
    for name, layers in by_layer.items():
        if name != 'load':
            metrics[f'experts/{name}'] = sum(layers.values()) / len(layers)
        metrics |= {f'experts/{layer}/{name}': value for layer, value in layers.items()}
    return metrics
