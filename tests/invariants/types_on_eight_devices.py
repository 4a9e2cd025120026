"""One MoE layer of bfloat16 on several meshes, its output and gradients: called in a process with eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from tests.moe.quick import jit, random_params
from upcycle import partitioning
from upcycle.models.layers import MlpBlock
from upcycle.moe.config import MoEConfig
from upcycle.moe.layer import METRICS, MoELayer

B, L, D, F, E = 16, 16, 32, 64, 8
MESHES = {'one device': (1, 1, 1), '8x1x1': (8, 1, 1), '1x8x1': (1, 8, 1), '2x4x1': (2, 4, 1), '2x2x2': (2, 2, 2)}
# The type of the activations, and that in which they cross the network.
TYPES = {'bfloat16': ('bfloat16', None), 'over the network': ('float32', 'bfloat16')}
ROUTERS = {
    'expert choice': {'router': 'expert_choice'},
    'top 2': {'router': 'top_k', 'num_selected_experts': 2},
    'top 2, ragged': {'router': 'top_k', 'num_selected_experts': 2, 'dispatch': 'ragged'},
}


def _layer(types: str, router: str) -> MoELayer:
    dtype, network = TYPES[types]
    config = MoEConfig(
        num_experts=E,
        group_size=32,
        groups_multiple_of=8,
        normalize_combine_weights=True,
        network_dtype=network,
        **ROUTERS[router],
    )
    return MoELayer(config, MlpBlock, {'mlp_dim': F, 'dtype': jnp.dtype(dtype)})


def layer(types: str, router: str, mesh_name: str) -> dict[str, np.ndarray]:
    """Of one layer on that mesh: its output, gradients and metrics, as float32."""
    # Numbers that bfloat16 holds, so that the router's input is the same in either type, and its logits to rounding.
    x_BxLxD = np.random.default_rng(0).normal(size=(B, L, D)).astype(jnp.bfloat16).astype(np.float32)
    towards_BxLxD = np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)
    real_BxL = np.ones((B, L), bool)
    layer, dtype = _layer(types, router), TYPES[types][0]
    params, boxed = _params(types, router)

    def loss(params, x_BxLxD):
        y_BxLxD, written = layer.apply({'params': params}, x_BxLxD, real_BxL, training=True, mutable=[METRICS])
        return (y_BxLxD.astype(jnp.float32) * towards_BxLxD).sum(), (y_BxLxD, written[METRICS])

    shape = MESHES[mesh_name]
    mesh = partitioning.make_mesh(shape, E, jax.devices()[: int(np.prod(shape))])
    with partitioning.use(mesh):
        specs = partitioning.param_specs(boxed, mesh)
        placed = jax.device_put(params, jax.tree.map(functools.partial(NamedSharding, mesh), specs))
        x = jax.device_put(x_BxLxD.astype(dtype), partitioning.batch_sharding(mesh))
        (_, (y, metrics)), grads = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(placed, x)
    assert y.dtype == dtype and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads[0]))
    found = {'output': y, 'of the input': grads[1]}
    found |= {f'of {path}': leaf for path, leaf in flatten_dict(grads[0], sep='/').items()}
    found |= {f'metric {path}': leaf for path, leaf in flatten_dict(metrics, sep='/').items()}
    return {path: np.asarray(leaf, np.float32) for path, leaf in found.items()}


@functools.cache
def _params(types: str, router: str):
    """Parameters, and their shapes with their logical axes."""
    layer, inputs = _layer(types, router), (jnp.zeros((B, L, D)), jnp.ones((B, L), bool))
    boxed = jax.eval_shape(functools.partial(layer.init, training=True), jax.random.key(0), *inputs)['params']
    return jax.device_get(random_params(layer, *inputs, training=True)), boxed
