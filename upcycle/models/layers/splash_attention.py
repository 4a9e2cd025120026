"""JAX's Pallas attention for TPUs that computes only the blocks of keys that a causal mask or a window leaves."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from upcycle import partitioning

_BLOCK = 512
_LANES = 128

Segments = tuple[jax.Array, jax.Array]


def splash_attention(
    query_BxQxHxN: jax.Array,
    key_BxKxMxN: jax.Array,
    value_BxKxMxN: jax.Array,
    segment_ids: Segments | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float = 1.0,
    interpret: bool = False,
) -> jax.Array:
    """Computes `attention.attention` without a bias; `interpret` runs it on CPUs."""
    local = functools.partial(_local, causal=causal, window=window, soft_cap=soft_cap, scale=scale, interpret=interpret)
    arrays = query_BxQxHxN, key_BxKxMxN, value_BxKxMxN, segment_ids
    mesh = partitioning.current_mesh()
    if mesh is None:
        return local(*arrays)
    # Query heads stay with their key head.
    wide = P(partitioning.BATCH_AXES, None, partitioning.head_axis(mesh, key_BxKxMxN.shape[2]))
    ids = None if segment_ids is None else (P(partitioning.BATCH_AXES),) * 2
    # The kernel does not say over which axes its results vary.
    split = jax.shard_map(local, in_specs=(wide, wide, wide, ids), out_specs=wide, check_vma=False)
    return split(*arrays)


def _local(
    query_BxQxHxN: jax.Array,
    key_BxKxMxN: jax.Array,
    value_BxKxMxN: jax.Array,
    segment_ids: Segments | None,
    *,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float,
    interpret: bool,
) -> jax.Array:
    """One device's part. Lengths are padded to blocks."""
    B, Q, H, _ = query_BxQxHxN.shape
    K = key_BxKxMxN.shape[1]
    query_block, key_block = _block(Q), _block(K)
    query_padding, key_padding = -Q % query_block, -K % key_block
    if key_padding and not causal and segment_ids is None:
        segment_ids = jnp.zeros((B, Q), jnp.int32), jnp.zeros((B, K), jnp.int32)
    if segment_ids is not None:
        # Queries that are padding see themselves if they are causal, and else nothing.
        query_ids, key_ids = segment_ids
        query_ids = jnp.pad(query_ids, ((0, 0), (0, query_padding)), constant_values=-1)
        key_ids = jnp.pad(key_ids, ((0, 0), (0, key_padding)), constant_values=-1 if causal else -2)
        segment_ids = splash.SegmentIds(query_ids, key_ids)
    paddings = query_padding, key_padding, key_padding
    scaled = query_BxQxHxN if scale == 1 else (query_BxQxHxN.astype(jnp.float32) * scale).astype(query_BxQxHxN.dtype)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
        for x, padding in zip((scaled, key_BxKxMxN, value_BxKxMxN), paddings, strict=True)
    )
    shape = Q + query_padding, K + key_padding
    if window is not None:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    else:
        mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )
    out = jax.vmap(kernel, in_axes=(0, 0, 0, 0 if segment_ids is not None else None))(query, key, value, segment_ids)
    return out.swapaxes(1, 2)[:, :Q]


def _block(length: int) -> int:
    """Returns the rows of a block: a multiple of 128, at most 512, that pads the length least."""
    sizes = range(_LANES, min(_BLOCK, -(-length // _LANES) * _LANES) + 1, _LANES)
    return max(sizes, key=lambda size: (-(-length % size), size))
