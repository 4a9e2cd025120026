"""One dropless layer on several meshes, by every exchange: called in a process with eight devices."""

import contextlib
import functools
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from tests.moe.quick import jit, random_params
from upcycle import partitioning
from upcycle.models.layers import MlpBlock
from upcycle.moe import megablox
from upcycle.moe.config import MoEConfig
from upcycle.moe.layer import METRICS, MoELayer

B, L, D, F, E = 16, 8, 32, 48, 8
# How much every token likes the first expert, so that it gets nearly half of the choices.
LIKED = 4.0


def layer(
    exchange: str,
    mesh_shape: tuple[int, int, int],
    factor: float = 8.0,
    *,
    skewed: bool = False,
    over_data: bool = False,
    kernel: bool = False,
    changed_from: int | None = None,
) -> dict[str, np.ndarray]:
    """Output, gradients and share of dropped choices of a layer in training.

    Args:
      exchange: `EXPERT_EXCHANGE`.
      mesh_shape: of the first devices.
      factor: `EXCHANGE_CAPACITY_FACTOR`.
      skewed: give the first expert nearly half of the choices.
      over_data: split parameters over `data`.
      kernel: multiply with the TPU's kernels, interpreted.
      changed_from: change the last sequence from this position on.
    """
    config = MoEConfig(
        E, router='top_k', dispatch='ragged', normalize_combine_weights=True, groups_multiple_of=8,
        exchange=exchange, exchange_capacity_factor=factor,
    )  # fmt: skip
    module = MoELayer(config, MlpBlock, _arguments())
    params, boxed = _params()
    x_BxLxD = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
    towards_BxLxD = np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)
    if skewed:
        x_BxLxD[..., 0] = np.abs(x_BxLxD[..., 0]) + 1
        params = jax.tree.map(np.copy, params)
        params['router']['router_weights']['w']['kernel'][0, 0] += LIKED
    if changed_from is not None:
        x_BxLxD[-1, changed_from:] *= -1
    real_BxL = np.arange(L) < np.where(np.arange(B) == 3, L - 3, L)[:, None]

    def loss(params, x_BxLxD):
        y_BxLxD, written = module.apply({'params': params}, x_BxLxD, real_BxL, training=True, mutable=[METRICS])
        return (y_BxLxD * towards_BxLxD).sum(), (y_BxLxD, written[METRICS])

    mesh = partitioning.make_mesh(mesh_shape, E, jax.devices()[: int(np.prod(mesh_shape))])
    with partitioning.use(mesh, over_data=over_data):
        specs = partitioning.param_specs(boxed, mesh, over_data=over_data)
        placed = jax.device_put(params, jax.tree.map(functools.partial(NamedSharding, mesh), specs))
        x = jax.device_put(x_BxLxD, partitioning.batch_sharding(mesh))
        step = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        with _interpreted() if kernel else contextlib.nullcontext([]) as calls:
            lowered = step.lower(placed, x)
        assert bool(calls) == kernel
        (_, (y, metrics)), grads = lowered.compile()(placed, x)
    found = {'output': y, 'of the input': grads[1], 'dropped': metrics['fraction_dropped'], 'load': metrics['load']}
    found |= {f'of {path}': leaf for path, leaf in flatten_dict(grads[0], sep='/').items()}
    return {path: np.asarray(leaf) for path, leaf in found.items()}


def _arguments():
    return {'mlp_dim': F, 'activations': ('silu', 'linear'), 'use_bias': True} | {
        'embed_axis': 'mlp_embed',
        'mlp_axis': 'expert_mlp',
    }


@functools.cache
def _params():
    module = MoELayer(MoEConfig(E, router='top_k', dispatch='ragged'), MlpBlock, _arguments())
    inputs = jnp.zeros((B, L, D)), jnp.ones((B, L), bool)
    boxed = jax.eval_shape(functools.partial(module.init, training=True), jax.random.key(0), *inputs)['params']
    return jax.device_get(random_params(module, *inputs, training=True)), boxed


@contextlib.contextmanager
def _interpreted():
    """Takes the TPU's kernel where there is one, interpreted, and yields the list of such calls."""
    chosen, calls = jax.lax.platform_dependent, []

    def choose(*operands, default=None, **kernels):
        tpu = kernels.get('tpu')
        if getattr(tpu, 'func', None) not in (megablox.product, megablox.gradients):
            return chosen(*operands, default=default, **kernels)
        calls.append(tpu)
        return tpu(*operands, interpret=True)

    with unittest.mock.patch.object(jax.lax, 'platform_dependent', choose):
        yield calls
