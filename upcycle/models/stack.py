"""A stack of layers: one after the other, rematerialised or not, or as one compiled block that is looped over.

Parameters are `layers_0`, `layers_1`, ... (T5) or `encoderblock_0`, ... (ViT) however the stack is compiled: a loop stacks them
on the way in, so that neither the surgery, nor the optimizer, nor a checkpoint knows about it, and a run can be resumed with the
other form.
"""

import enum
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from upcycle import partitioning
from upcycle.models import memory
from upcycle.models.casting import needed_as_they_are
from upcycle.models.layers import PRODUCT
from upcycle.moe.all_to_all import CROSSED
from upcycle.moe.layer import METRICS
from upcycle.moe.routing import DECISION

ACTIVATIONS = ('batch', 'length', 'embed')


class Remat(enum.StrEnum):
    """What the backward pass computes again instead of keeping, layer by layer.

    Every form keeps the routers' decisions: recomputed activations are rounded differently, so that a router could choose other
    experts, and a token's gradient would go to an expert that never saw it. They are a few integers a token: with capacity
    factor 2, 8 bytes in an Expert Choice layer and 16 in a Top-2 layer.
    """

    NONE = 'none'
    MINIMAL = 'minimal'  # all but the products with weight matrices
    EXCHANGE = 'exchange'  # all but what crossed the network between expert shards
    FULL = 'full'  # all, the all-to-alls of expert parallelism included

    @property
    def keeps_attention_weights(self) -> bool:
        """While the backward pass is in a layer. They are the largest arrays there that are cheap to compute once more."""
        return self in (Remat.NONE, Remat.MINIMAL)


def _policy(remat: Remat):
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names
    return {
        Remat.MINIMAL: policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, named(DECISION, CROSSED, PRODUCT)
        ),
        Remat.EXCHANGE: named(DECISION, CROSSED),
        Remat.FULL: named(DECISION),
    }[remat]


def apply_layers(
    parent: nn.Module,
    layer: type[nn.Module],
    config: Any,
    kinds: Sequence[Any],
    x_BxLxD: jax.Array,
    arrays: tuple[jax.Array | None, ...],
    switches: tuple[bool | int, ...],
    *,
    remat: Remat,
    scan: bool,
    last: bool,
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
      last: no other stack follows it, so that the backward pass begins with it.
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
            ends = last and start + period * repeats == len(kinds)
            x_BxLxD = _loop(
                parent, layer, config, block, start, repeats, x_BxLxD, arrays, switches, remat, ends, prefix
            )
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
    switches: tuple[bool | int, ...],
    remat: Remat,
    last: bool,
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

    block_axes = tuple(axes(j) for j in range(period))
    own = tuple([params[f'{prefix}{start + r * period + j}'] for r in range(repeats)] for j in range(period))

    def layer_of(j: int) -> memory.Layer:
        def apply(params, x_BxLxD, arrays, keys, index):
            layer_keys = {name: jax.random.fold_in(key, index * period + j) for name, key in keys.items()}
            x_BxLxD, metrics = layer(config, block[j], parent=None).apply(
                {'params': params}, x_BxLxD, *arrays, *switches, rngs=layer_keys, mutable=[METRICS]
            )
            return nn.with_logical_constraint(x_BxLxD, ACTIVATIONS), metrics.get(METRICS, {})

        return apply

    layers = tuple(layer_of(j) for j in range(period))
    dtypes = tuple(
        _stack_dtypes(layer, config.dtype, params[0], x_BxLxD, arrays, keys, jnp.zeros((), jnp.int32))
        for layer, params in zip(layers, own, strict=True)
    )
    if remat is not Remat.NONE:
        layers = tuple(jax.checkpoint(layer, policy=_policy(remat), prevent_cse=False) for layer in layers)
    stack = functools.partial(_stack_block, block_axes=block_axes, dtypes=dtypes)
    if remat is Remat.FULL:
        x_BxLxD, written = memory.replayed(layers, stack, block_axes, own, x_BxLxD, arrays, keys, stack_again=not last)
    else:
        x_BxLxD, written = _scan(layers, stack(own), x_BxLxD, arrays, keys)
    if parent.is_mutable_collection(METRICS):
        for j, metrics in enumerate(written):
            for r in range(repeats if metrics else 0):
                here = jax.tree.map(lambda leaf, r=r: leaf[r], metrics)
                parent.put_variable(METRICS, f'{prefix}{start + r * period + j}', here)
    return x_BxLxD


def _scan(
    layers: Sequence[memory.Layer], stacked: Any, x_BxLxD: jax.Array, arrays: Any, keys: Any
) -> tuple[jax.Array, Any]:
    """The loop: (B, L, D), and, stacked, what each layer wrote."""

    def body(x_BxLxD, xs):
        index, params = xs
        written = []
        for layer, own in zip(layers, params, strict=True):
            x_BxLxD, metrics = layer(own, x_BxLxD, arrays, keys, index)
            written.append(metrics)
        return x_BxLxD, written

    repeats = jax.tree.leaves(stacked)[0].shape[0]
    return jax.lax.scan(body, x_BxLxD, (jnp.arange(repeats), stacked))


def _stack_dtypes(layer: memory.Layer, dtype: Any, params: Any, *arguments: Any) -> Any:
    """For each parameter of a layer, the type of its stack.

    It is `dtype` where the layer itself does nothing with the parameter but cast it to that type: cast first it is the same
    number, and half as large. Any other one is stacked as it is, since a layer that is not in a loop reads it so.
    """
    as_they_are = needed_as_they_are(layer, dtype, params, *arguments)
    return jax.tree.map(lambda leaf, keep: leaf.dtype if keep else jnp.dtype(dtype), params, as_they_are)


def _stack_block(params: Sequence[Sequence[Any]], block_axes: Sequence[Any], dtypes: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_stack(layers, *how) for layers, *how in zip(params, block_axes, dtypes, strict=True))


def _stack(layers: Sequence[Any], axes: Any, dtypes: Any) -> Any:
    """Stacked parameters, each in the type of its stack.

    A stack lies on the mesh as its parameters do, and so does its gradient, which the compiler would else be free to lay out
    along another axis, and to move from there in every step.
    """

    def stack(logical: PartitionSpec, dtype: Any, *leaves: jax.Array) -> jax.Array:
        return partitioning.constrain_stack(jnp.stack([leaf.astype(dtype) for leaf in leaves]), logical)

    return jax.tree.map(stack, axes, dtypes, *layers)
