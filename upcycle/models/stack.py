"""A stack of layers: one after the other, rematerialised or not, or as one compiled block that is looped over.

Parameters are `layers_0`, `layers_1`, ... (T5) or `encoderblock_0`, ... (ViT) however the stack is compiled: a loop stacks them
on the way in, so that neither the surgery, nor the optimizer, nor a checkpoint knows about it, and a run can be resumed with the
other form.
"""

import enum
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from upcycle import partitioning
from upcycle.models.layers import PRODUCT
from upcycle.moe.exchange import CROSSED
from upcycle.moe.layer import METRICS

ACTIVATIONS = ('batch', 'length', 'embed')


class Remat(enum.StrEnum):
    """What the backward pass computes again instead of keeping, layer by layer."""

    NONE = 'none'
    MINIMAL = 'minimal'  # all but the products with weight matrices
    EXCHANGE = 'exchange'  # all but what crossed the network between expert shards
    FULL = 'full'  # all, the all-to-alls of expert parallelism included


def _policy(remat: Remat):
    policies = jax.checkpoint_policies
    crossed = policies.save_only_these_names(CROSSED)
    return {
        Remat.MINIMAL: policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(CROSSED, PRODUCT)
        ),
        Remat.EXCHANGE: crossed,
        Remat.FULL: policies.nothing_saveable,
    }[remat]


def apply_layers(
    parent: nn.Module,
    layer: type[nn.Module],
    config: Any,
    kinds: Sequence[Any],
    x_BxLxD: jax.Array,
    arrays: tuple[jax.Array | None, ...],
    switches: tuple[bool, ...],
    *,
    remat: Remat,
    scan: bool,
    prefix: str = 'layers_',
) -> jax.Array:
    """Applies a stack of layers inside the compact method of `parent`.

    Args:
      parent: owns the parameters of the layers.
      layer: called as `layer(config, kind)(x, *arrays, *switches)`.
      config: of every layer. Its `dtype` is that of the activations.
      kinds: what tells one layer from another, such as its MoE.
      x_BxLxD: input.
      arrays: the same for every layer.
      switches: the same for every layer, static.
      remat: see `Remat`.
      scan: loop over blocks of equal layers.
      prefix: of the layers' names, before their number.

    Returns:
      (B, L, D).
    """
    module = layer
    if remat is not Remat.NONE:
        first = 2 + len(arrays)
        module = nn.remat(layer, policy=_policy(remat), static_argnums=tuple(range(first, first + len(switches))))
    scan = scan and not parent.is_initializing()
    for start, period, repeats in segments(kinds):
        if scan and repeats > 1:
            block = kinds[start : start + period]
            x_BxLxD = _loop(parent, layer, config, block, start, repeats, x_BxLxD, arrays, switches, remat, prefix)
            continue
        for i in range(start, start + period * repeats):
            x_BxLxD = module(config, kinds[i], name=f'{prefix}{i}')(x_BxLxD, *arrays, *switches)
            x_BxLxD = nn.with_logical_constraint(x_BxLxD, ACTIVATIONS)
    return x_BxLxD


def segments(kinds: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Cuts a stack into repeated blocks: (first layer, layers in the block, repeats).

    The whole stack is one segment where it is periodic (every second layer sparse); else runs of equal layers are segments (the
    last half sparse).
    """
    depth = len(kinds)
    for period in range(1, depth // 2 + 1):
        if depth % period == 0 and all(kinds[i] == kinds[i % period] for i in range(depth)):
            return [(0, period, depth // period)]
    starts = [i for i in range(depth) if i == 0 or kinds[i] != kinds[i - 1]]
    ends = [*starts[1:], depth][: len(starts)]
    return [(start, 1, end - start) for start, end in zip(starts, ends, strict=True)]


def _loop(
    parent: nn.Module,
    layer: type[nn.Module],
    config: Any,
    block: Sequence[Any],
    start: int,
    repeats: int,
    x_BxLxD: jax.Array,
    arrays: tuple[jax.Array | None, ...],
    switches: tuple[bool, ...],
    remat: Remat,
    prefix: str,
) -> jax.Array:
    """`repeats` blocks of layers as a scan over their stacked parameters."""
    params = parent.variables['params']
    period = len(block)
    keys = {name: parent.make_rng(name) for name in ('dropout', 'jitter') if parent.has_rng(name)}

    def axes(j: int) -> Any:
        def init() -> Any:
            return layer(config, block[j], parent=None).init(
                {'params': jax.random.key(0), **keys}, x_BxLxD, *arrays, *switches
            )

        return partitioning.logical_axes(jax.eval_shape(init)['params'])

    stacked = tuple(
        _stack([params[f'{prefix}{start + r * period + j}'] for r in range(repeats)], axes(j), config.dtype)
        for j in range(period)
    )

    def one(j: int):
        def apply(params, x_BxLxD, keys):
            return layer(config, block[j], parent=None).apply(
                {'params': params}, x_BxLxD, *arrays, *switches, rngs=keys, mutable=[METRICS]
            )

        if remat is Remat.NONE:
            return apply
        return jax.checkpoint(apply, policy=_policy(remat), prevent_cse=False)

    def body(x_BxLxD, xs):
        index, params = xs
        written = []
        for j in range(period):
            layer_keys = {name: jax.random.fold_in(key, index * period + j) for name, key in keys.items()}
            x_BxLxD, metrics = one(j)(params[j], x_BxLxD, layer_keys)
            x_BxLxD = nn.with_logical_constraint(x_BxLxD, ACTIVATIONS)
            written.append(metrics.get(METRICS, {}))
        return x_BxLxD, written

    x_BxLxD, written = jax.lax.scan(body, x_BxLxD, (jnp.arange(repeats), stacked))
    if parent.is_mutable_collection(METRICS):
        for j, metrics in enumerate(written):
            for r in range(repeats if metrics else 0):
                here = jax.tree.map(lambda leaf, r=r: leaf[r], metrics)
                parent.put_variable(METRICS, f'{prefix}{start + r * period + j}', here)
    return x_BxLxD


def _stack(layers: Sequence[Any], axes: Any, dtype: Any) -> Any:
    """Stacked parameters, in the type that they are used in: all but the routers', which stay in float32.

    A stack lies on the mesh as its parameters do, and so does its gradient, which the compiler would else be free to lay out
    along another axis, and to move from there in every step.
    """

    def stack(path: tuple[Any, ...], logical: PartitionSpec, *leaves: jax.Array) -> jax.Array:
        in_router = any(key.key == 'router' for key in path)
        stacked = jnp.stack([leaf if in_router else leaf.astype(dtype) for leaf in leaves])
        return partitioning.constrain_stack(stacked, logical)

    is_axes = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree_util.tree_map_with_path(stack, axes, *layers, is_leaf=is_axes)
