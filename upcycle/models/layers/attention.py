"""Attention of all families: one function, which chooses an implementation by the platform of the mesh in use."""

import enum
import functools
import re

import jax
import jax.numpy as jnp

from upcycle import partitioning
from upcycle.models import memory

Segments = tuple[jax.Array, jax.Array]


class Implementation(enum.StrEnum):
    """Ways to compute attention."""

    REFERENCE = 'reference'  # plain JAX
    ROWS = 'rows'  # TPU: `row_attention`
    SPLASH = 'splash'  # TPU: JAX's block-sparse kernel
    CUDNN = 'cudnn'  # GPU


def attention(
    query_BxQxHxN: jax.Array,
    key_BxKxMxN: jax.Array,
    value_BxKxMxN: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    segment_ids: Segments | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float = 1.0,
    float32_logits: bool = True,
    keep_weights: bool = True,
) -> jax.Array:
    """Averages values under softmax(scale * query . key + bias), over the keys that a query sees.

    The result is (B, Q, H, N) in the values' type. A query that sees no key has some finite average of values.

    Args:
      query_BxQxHxN: queries; heads h * H / M to (h + 1) * H / M share key head h.
      key_BxKxMxN: keys.
      value_BxKxMxN: values.
      mask: bool, broadcast to (B, Q, K), True where a query may see a key; for caches, and always computed by the reference.
      bias: (H, Q, K), added to the logits.
      segment_ids: int32 (B, Q) and (B, K); a query sees keys with its own number. See `segments`.
      causal: a query sees keys up to its own position.
      window: with `causal`, the last that many of them.
      soft_cap: c replaces scaled logits x by c * tanh(x / c), before bias and mask (Gemma 2).
      scale: factor of the logits.
      float32_logits: in the reference; False for logits in the queries' type. Kernels have float32 logits.
      keep_weights: in the reference, for the backward pass, which recomputes them otherwise. They grow with the square of the
        length. Kernels keep none.
    """
    arrays = query_BxQxHxN, key_BxKxMxN, value_BxKxMxN
    how = {'causal': causal, 'scale': scale}
    chosen = implementation(
        *arrays, mask=mask, bias=bias, segment_ids=segment_ids, window=window, soft_cap=soft_cap, causal=causal
    )
    # Kernels are imported where they run: Pallas takes a second to import.
    if chosen is Implementation.ROWS:
        from upcycle.models.layers.row_attention import row_attention

        return row_attention(*arrays, bias, segment_ids, **how, interpret=interpreted)
    if chosen is Implementation.SPLASH:
        from upcycle.models.layers.splash_attention import splash_attention

        return splash_attention(*arrays, segment_ids, **how, window=window, soft_cap=soft_cap, interpret=interpreted)
    if chosen is Implementation.CUDNN:
        return jax.nn.dot_product_attention(
            *arrays,
            bias=None if bias is None else bias[None].astype(query_BxQxHxN.dtype),
            mask=None if segment_ids is None else (segment_ids[0][:, :, None] == segment_ids[1][:, None])[:, None],
            scale=scale,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation='cudnn',
        )
    visible = _visible(mask, segment_ids, causal, window, query_BxQxHxN.shape[1], key_BxKxMxN.shape[1])
    return reference(
        *arrays,
        visible,
        bias,
        scale=scale,
        soft_cap=soft_cap,
        float32_logits=float32_logits,
        keep_weights=keep_weights,
    )


# Tests run the TPU's kernels on CPUs.
interpreted = False
# Pallas has no products in bfloat16 there.
_TPUS_WITHOUT_KERNELS = ('TPU v2', 'TPU v3')


def implementation(
    query_BxQxHxN: jax.Array,
    key_BxKxMxN: jax.Array,
    value_BxKxMxN: jax.Array,
    *,
    mask: jax.Array | None,
    bias: jax.Array | None,
    segment_ids: Segments | None,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
) -> Implementation:
    """Chooses how `attention` computes its arguments on the platform of the mesh in use."""
    B, Q, _, N = query_BxQxHxN.shape
    K = key_BxKxMxN.shape[1]
    device = partitioning.device()
    if mask is not None or Q == 1 or B % partitioning.batch_shards(partitioning.current_mesh()):
        return Implementation.REFERENCE
    if interpreted or (device.platform == 'tpu' and device.device_kind not in _TPUS_WITHOUT_KERNELS):
        from upcycle.models.layers.row_attention import fits

        in_rows = window is None and soft_cap is None and fits(query_BxQxHxN, key_BxKxMxN, bias)
        # Splash attention skips blocks that nothing sees, but pads heads of 64 to 128.
        if in_rows and (bias is not None or not causal):
            return Implementation.ROWS
        return Implementation.SPLASH if bias is None else Implementation.REFERENCE
    if device.platform == 'gpu' and soft_cap is None:
        # cuDNN's runs on Ampere and later; AMD's devices have names instead of numbers.
        capability = re.fullmatch(r'\d+\.\d+', getattr(device, 'compute_capability', ''))
        half = query_BxQxHxN.dtype in (jnp.bfloat16, jnp.float16) and query_BxQxHxN.dtype == value_BxKxMxN.dtype
        # A bias with segments would be (B, H, Q, K) there. Gradients need even lengths.
        possible = (bias is None or segment_ids is None) and Q % 2 == K % 2 == 0 and N % 8 == 0 and N <= 128
        if capability and float(capability[0]) >= 8 and half and possible:
            return Implementation.CUDNN
    return Implementation.REFERENCE


def mask_value(dtype: jnp.dtype) -> float:
    """Returns the bias of masked positions (T5X: -1e10), finite in the type with room for other biases.

    With infinities a row in which everything is masked would be nan, and so would every gradient.
    """
    return float(jnp.finfo(dtype).min) / 2


def reference(
    query_BxQxHxN: jax.Array,
    key_BxKxMxN: jax.Array,
    value_BxKxMxN: jax.Array,
    visible: jax.Array | None,
    bias: jax.Array | None,
    *,
    scale: float,
    soft_cap: float | None,
    float32_logits: bool,
    keep_weights: bool,
) -> jax.Array:
    """Computes `attention` in plain JAX; `visible` is bool, broadcast to (B, Q, K), or None."""
    B, Q, H, N = query_BxQxHxN.shape
    K, M = key_BxKxMxN.shape[1:3]

    def average(rest: tuple[jax.Array | None, ...], query_BxQxHxN: jax.Array) -> jax.Array:
        key_BxKxMxN, value_BxKxMxN, visible, bias = rest
        # Heads before positions, and one axis of rows for each key head: XLA:CPU multiplies others up to four times slower.
        query_BxMxRxN = query_BxQxHxN.swapaxes(1, 2).reshape(B, M, H // M * Q, N)
        key_BxMxKxN, value_BxMxKxN = key_BxKxMxN.swapaxes(1, 2), value_BxKxMxN.swapaxes(1, 2)
        dtype = jnp.float32 if float32_logits else query_BxQxHxN.dtype
        logits = jnp.einsum('bmrn,bmkn->bmrk', query_BxMxRxN, key_BxMxKxN, preferred_element_type=dtype)
        logits = logits.reshape(B, H, Q, K)
        if scale != 1:
            logits *= scale
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        if bias is not None:
            logits += bias.astype(dtype)
        if visible is not None:
            logits += jnp.where(visible[:, None], 0.0, mask_value(dtype)).astype(dtype)
        weights_BxMxRxK = memory.softmax(logits).astype(value_BxKxMxN.dtype).reshape(B, M, H // M * Q, K)
        out_BxMxRxN = jnp.einsum('bmrk,bmkn->bmrn', weights_BxMxRxK, value_BxMxKxN)
        return out_BxMxRxN.reshape(B, H, Q, N).swapaxes(1, 2)

    rest = (key_BxKxMxN, value_BxKxMxN, visible, bias)
    return average(rest, query_BxQxHxN) if keep_weights else memory.recomputed(average, rest, query_BxQxHxN)


def segments(
    query_real_BxQ: jax.Array,
    key_real_BxK: jax.Array,
    query_ids_BxQ: jax.Array | None = None,
    key_ids_BxK: jax.Array | None = None,
) -> Segments:
    """Returns `segment_ids` in which padding sees nothing and is not seen.

    Args:
      query_real_BxQ: bool, False at padding.
      key_real_BxK: the same of keys.
      query_ids_BxQ: int, at least 0, of packed segments; None for one segment.
      key_ids_BxK: the same of keys.
    """
    if query_ids_BxQ is None or key_ids_BxK is None:
        query_ids_BxQ = key_ids_BxK = jnp.zeros((1, 1), jnp.int32)
    return (
        jnp.where(query_real_BxQ, query_ids_BxQ.astype(jnp.int32) + 2, 1),
        jnp.where(key_real_BxK, key_ids_BxK.astype(jnp.int32) + 2, 0),
    )


def _visible(
    mask: jax.Array | None, segment_ids: Segments | None, causal: bool, window: int | None, queries: int, keys: int
) -> jax.Array | None:
    """Returns which keys a query sees, bool, broadcast to (B, Q, K); None if it sees all."""
    masks = [] if mask is None else [mask]
    if causal:
        distance_QxK = jnp.arange(queries)[:, None] - jnp.arange(keys)
        masks.append((distance_QxK >= 0)[None])
        if window is not None:
            masks.append((distance_QxK < window)[None])
    if segment_ids is not None:
        masks.append(segment_ids[0][:, :, None] == segment_ids[1][:, None])
    return functools.reduce(jnp.logical_and, masks) if masks else None
