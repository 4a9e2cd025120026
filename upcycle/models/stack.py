"""A stack of layers: unrolled or as a loop over one compiled block, rematerialised or not.

Parameters are `layers_0`, `layers_1`, ... (T5) or `encoderblock_0`, ... (ViT) in either form. The loop stacks them on the way in,
so that surgery, optimizer and checkpoints do not depend on the form, and a run can be resumed with the other one.
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
    """What the backward pass recomputes in each layer instead of keeping it.

    Every form keeps the routers' decisions: recomputed activations are rounded differently, so a router could choose other
    experts, and a token's gradient would go to an expert that never saw it. With capacity factor 2 they take 8 bytes a token in
    an Expert Choice layer and 16 in a Top-2 layer.
    """

    NONE = 'none'
    MINIMAL = 'minimal'  # everything except products with weight matrices and all-to-all results
    EXCHANGE = 'exchange'  # everything except all-to-all results
    FULL = 'full'  # everything, all-to-alls included

    @property
    def keeps_attention_weights(self) -> bool:
        """Whether a layer's backward pass keeps attention weights, its largest arrays that are cheap to recompute."""
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
    kinds: Sequence[Any],
    x_BxLxD: jax.Array,
    arrays: tuple[Any, ...],
    switches: tuple[bool | int, ...],
    *,
    last: bool,
    scan: bool = True,
    prefix: str = 'layers_',
) -> jax.Array:
    """Applies a stack of layers inside the compact method of `parent`.

    Args:
      parent: owns the parameters of the layers. Its `config` has fields `dtype` (of activations), `remat` and `scan_layers`.
      layer: called as `layer(config, kind)(x, *arrays, *switches)`.
      kinds: what differs between layers, such as the MoE.
      x_BxLxD: input.
      arrays: the same for every layer.
      switches: the same for every layer, static.
      last: whether the backward pass begins with this stack.
      scan: False to unroll the stack regardless of `scan_layers`.
      prefix: of the layers' names, before their number.

    Returns:
      (B, L, D).
    """
    config, module = parent.config, layer
    remat = config.remat
    if remat is not Remat.NONE:
        first = 2 + len(arrays)
        module = nn.remat(layer, policy=_policy(remat), static_argnums=tuple(range(first, first + len(switches))))
    scan = scan and config.scan_layers and not parent.is_initializing()
    for start, period, repeats in segments(kinds):
        numbers = range(start, start + period * repeats)
        if scan and repeats > 1:
            block = [layer(config, kind, parent=None) for kind in kinds[start : start + period]]
            names = [[f'{prefix}{i}' for i in numbers[j::period]] for j in range(period)]
            ends = last and numbers.stop == len(kinds)
            x_BxLxD = _loop(parent, block, names, x_BxLxD, arrays, switches, remat, ends)
            continue
        for i in numbers:
            x_BxLxD = module(config, kinds[i], name=f'{prefix}{i}')(x_BxLxD, *arrays, *switches)
            x_BxLxD = nn.with_logical_constraint(x_BxLxD, ACTIVATIONS)
    return x_BxLxD


def segments(kinds: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Divides a stack into repeated blocks: (first layer, layers in the block, repeats).

    A periodic stack (every second layer sparse) is one segment. Otherwise runs of equal layers are segments (last half sparse).
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
    block: Sequence[nn.Module],
    names: Sequence[Sequence[str]],
    x_BxLxD: jax.Array,
    arrays: tuple[Any, ...],
    switches: tuple[bool | int, ...],
    remat: Remat,
    last: bool,
) -> jax.Array:
    """Applies a block of layers in a loop; `names` are those of each layer of the block in `parent`, one an iteration."""
    params = [[parent.variables['params'][name] for name in repeated] for repeated in names]
    keys = {name: parent.make_rng(name) for name in ('dropout', 'jitter') if parent.has_rng(name)}

    def axes(layer: nn.Module) -> Any:
        rngs = {'params': jax.random.key(0), **keys}
        boxed = jax.eval_shape(lambda: layer.init(rngs, x_BxLxD, *arrays, *switches)['params'])
        return partitioning.logical_axes(boxed)

    def layer_of(j: int) -> memory.Layer:
        def apply(params, x_BxLxD, arrays, keys, index):
            rngs = {name: jax.random.fold_in(key, index * len(block) + j) for name, key in keys.items()}
            x_BxLxD, written = block[j].apply(
                {'params': params}, x_BxLxD, *arrays, *switches, rngs=rngs, mutable=[METRICS]
            )
            return nn.with_logical_constraint(x_BxLxD, ACTIVATIONS), written.get(METRICS, {})

        return apply

    layers = [layer_of(j) for j in range(len(block))]
    block_axes = [axes(layer) for layer in block]
    dtypes = [
        _stack_dtypes(layers[j], block[j].config.dtype, params[j][0], x_BxLxD, arrays, keys, jnp.zeros((), jnp.int32))
        for j in range(len(block))
    ]
    if remat is not Remat.NONE:
        layers = [jax.checkpoint(layer, policy=_policy(remat), prevent_cse=False) for layer in layers]
    stack = functools.partial(_stack_block, block_axes=block_axes, dtypes=dtypes)
    if remat is Remat.FULL:
        x_BxLxD, metrics = memory.replayed(
            layers, stack, block_axes, params, x_BxLxD, arrays, keys, stack_again=not last
        )
    else:
        x_BxLxD, metrics = _scan(layers, stack(params), len(names[0]), x_BxLxD, arrays, keys)
    if parent.is_mutable_collection(METRICS):
        for repeated, stacked in zip(names, metrics, strict=True):
            for r, name in enumerate(repeated if stacked else ()):
                parent.put_variable(METRICS, name, jax.tree.map(lambda leaf, r=r: leaf[r], stacked))
    return x_BxLxD


def _scan(
    layers: Sequence[memory.Layer], stacked: Any, repeats: int, x_BxLxD: jax.Array, arrays: Any, keys: Any
) -> tuple[jax.Array, Any]:
    """Loops over the blocks; returns (B, L, D) and the stacked metrics of each layer."""

    def body(x_BxLxD, xs):
        index, params = xs
        metrics = []
        for layer, own in zip(layers, params, strict=True):
            x_BxLxD, written = layer(own, x_BxLxD, arrays, keys, index)
            metrics.append(written)
        return x_BxLxD, metrics

    return jax.lax.scan(body, x_BxLxD, (jnp.arange(repeats), stacked))


def _stack_dtypes(layer: memory.Layer, dtype: Any, params: Any, *arguments: Any) -> Any:
    """Returns the type of the stack of each parameter of a layer.

    It is `dtype` if all the layer does with the parameter is to cast it to that type, since the result is the same and the stack
    half as large. Other parameters keep their type.
    """
    as_they_are = needed_as_they_are(layer, dtype, params, *arguments)
    return jax.tree.map(lambda leaf, keep: leaf.dtype if keep else jnp.dtype(dtype), params, as_they_are)


def _stack_block(params: Sequence[Sequence[Any]], block_axes: Sequence[Any], dtypes: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_stack(layers, *how) for layers, *how in zip(params, block_axes, dtypes, strict=True))


def _stack(layers: Sequence[Any], axes: Any, dtypes: Any) -> Any:
    """Stacks parameters, each in the type of its stack.

    A stack and its gradient are sharded as the parameters. The compiler could shard the gradient along another axis, and would
    then have to move it in every step.
    """

    def stack(logical: PartitionSpec, dtype: Any, *leaves: jax.Array) -> jax.Array:
        return partitioning.constrain_stack(jnp.stack([leaf.astype(dtype) for leaf in leaves]), logical)

    return jax.tree.map(stack, axes, dtypes, *layers)
