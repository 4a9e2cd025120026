"""State of an MoE layer that has no gradient: a balancing bias, the weight of a loss, default outputs.

It lies in leaves `router_state/...`, initially zeros, which are saved with the parameters and read by the layer. The training
step updates them from the metrics of the step, without the optimizer.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from upcycle.moe.groups import layer_name
from upcycle.moe.routers.base import MoE
from upcycle.moe.routing import CHOSEN

NAME = 'router_state'
# Metrics that only update the state: the sum of each expert's outputs, and their number.
OUTPUT_SUM, OUTPUT_COUNT = 'output_sum', 'output_count'


class RouterState(nn.Module):
    """Returns the layer's state by name."""

    config: MoE

    @nn.compact
    def __call__(self, width: int) -> dict[str, jax.Array]:
        state = {}
        for name, shape in self.config.state_shapes(width).items():
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None,) * len(shape))
            state[name] = jax.lax.stop_gradient(self.param(name, init, shape, jnp.float32))
        return state


def split(params: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Splits a tree with the structure of the parameters into those with gradients, and the others, flattened."""
    flat = flatten_dict(params)
    state = {path: leaf for path, leaf in flat.items() if NAME in path}
    if not state:
        return params, {}
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path not in state}), state


def follow(
    params: Any, state: dict[Any, jax.Array], metrics: Mapping[str, jax.Array], layers: Mapping[str, MoE]
) -> Any:
    """Updates the state after a step, and joins it with the other parameters.

    Args:
      params: parameters with gradients, already updated.
      state: from `split`.
      metrics: of the step, by layer: 'experts/layers_1/load'.
      layers: configurations of the MoE layers by path.
    """
    if not state:
        return params
    flat = flatten_dict(params)
    for path, old in state.items():
        *layer, _, name = path
        layer = '/'.join(layer)
        config, seen = layers[layer], f'experts/{layer_name(layer)}'
        if name == 'bias':
            # Loss-free balancing (Wang et al. 2024, arXiv 2408.15664) counts all choices of an expert, dropped ones too. The
            # threshold makes an even share even despite rounding.
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
    """Returns the metrics without those that only update the state."""
    return {name: value for name, value in metrics.items() if not name.endswith((OUTPUT_SUM, OUTPUT_COUNT, CHOSEN))}
