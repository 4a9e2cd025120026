"""Numbers of an MoE layer that follow what it does, and no gradient: a bias that balances, the weight of a loss, ...

They are leaves `router_state/...` beside the router's, all zeros at first, saved with the parameters and read by the layer. No
optimizer knows them: the training step moves them on by the metrics of the step.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from upcycle.moe.routers.base import MoE
from upcycle.moe.routing import CHOSEN

NAME = 'router_state'
# Metrics that are only there to be followed: each expert's outputs added up, and how many they are.
OUTPUT_SUM, OUTPUT_COUNT = 'output_sum', 'output_count'


class RouterState(nn.Module):
    """The layer's leaves by name."""

    config: MoE

    @nn.compact
    def __call__(self, width: int) -> dict[str, jax.Array]:
        found = {}
        for name, shape in self.config.state_shapes(width).items():
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None,) * len(shape))
            found[name] = jax.lax.stop_gradient(self.param(name, init, shape, jnp.float32))
        return found


def split(params: Any) -> tuple[Any, dict[str, jax.Array]]:
    """The parameters that have gradients, and the others, flat. Of any tree with the parameters' structure."""
    flat = flatten_dict(params)
    state = {path: leaf for path, leaf in flat.items() if NAME in path}
    if not state:
        return params, {}
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path not in state}), state


def follow(
    params: Any, state: dict[Any, jax.Array], metrics: Mapping[str, jax.Array], layers: Mapping[str, MoE]
) -> Any:
    """All parameters after a step.

    Args:
      params: those with gradients, already updated.
      state: the others, from `split`.
      metrics: of the step, by layer: 'experts/layers_1/load'.
      layers: the configuration of each MoE layer by its path.
    """
    if not state:
        return params
    flat = flatten_dict(params)
    for path, old in state.items():
        *layer, _, name = path
        config = layers['/'.join(layer)]
        seen = '/'.join(['experts', *layer[:-1]])
        if name == 'bias':
            # Loss-free balancing (Wang et al. 2024, arXiv 2408.15664) counts what chose an expert, in a full one too. An even
            # share is even despite rounding.
            missing_E = 1.0 / config.num_experts - metrics[f'{seen}/{CHOSEN}']
            missing_E = jnp.where(jnp.abs(missing_E) < 1e-6, 0.0, missing_E)
            flat[path] = old + config.balance_bias_rate * jnp.sign(missing_E)
        elif name == 'loss_weight':
            how = config.adaptive_balance
            wanted = jnp.minimum(how.rate * metrics[f'{seen}/fraction_dropped'], how.largest)
            flat[path] = how.decay * old + (1.0 - how.decay) * wanted
        elif name == 'default_output':
            count_Ex1 = metrics[f'{seen}/{OUTPUT_COUNT}'][:, None]
            mean_ExD = metrics[f'{seen}/{OUTPUT_SUM}'] / jnp.maximum(count_Ex1, 1e-9)
            new_ExD = config.default_output_decay * old + (1.0 - config.default_output_decay) * mean_ExD
            flat[path] = jnp.where(count_Ex1 > 0, new_ExD, old)
    return unflatten_dict(flat)


def for_the_log(metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics without those that are only there to be followed."""
    return {name: value for name, value in metrics.items() if not name.endswith((OUTPUT_SUM, OUTPUT_COUNT, CHOSEN))}
