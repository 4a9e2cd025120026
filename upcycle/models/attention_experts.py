"""Attention experts (mixture of attention heads, arXiv 2210.05144): experts have query and output projections of their own.

Parameters: `router/...` as in an MoE layer, `expert/query/kernel` (E, D, M * N), `expert/out/kernel` (E, M * N, D), `key/kernel`
and `value/kernel` (D, M * N), perhaps `output_bias` (D,). Matched: modeling_jetmoe.py of transformers 5.24.
"""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle.models.grouped_attention import SelfAttention, kernel_init
from upcycle.models.layers import Dense
from upcycle.models.layers.attention import Segments
from upcycle.moe import ragged
from upcycle.moe.conventions import Exchange
from upcycle.moe.layer import choices_of, scores_of, with_output_bias
from upcycle.moe.routers.top_k import TopK
from upcycle.moe.routing import Choices

if TYPE_CHECKING:
    from upcycle.models.decoder_config import DecoderConfig


class AttentionExperts(SelfAttention):
    """Causal self-attention of one layer whose queries and outputs are those of the experts that a router chooses.

    Keys and values are shared. Each chosen expert makes one query head for each of the M key heads from the token, and projects
    their averages of values to the output. A token has K * M query heads.
    """

    @nn.compact
    def __call__(
        self,
        x_BxQxD: jax.Array,
        real_BxQ: jax.Array,
        position_BxQ: jax.Array,
        visible: Segments | jax.Array | None,
        index: jax.Array,
        training: bool,
        max_length: int | None,
    ) -> jax.Array:
        """Applies attention; see `SelfAttention.__call__`.

        Args:
          x_BxQxD: input.
          real_BxQ: bool, False at padding, which no expert takes.
          position_BxQ: positions.
          visible: which keys a query may see.
          index: of the first query.
          training: turns jitter and noise of the router on.
          max_length: of the cache; None for no cache.
        """
        c, moe = self.config, self.kind.attention_moe
        B, Q, D = x_BxQxD.shape
        K, M, N = moe.num_selected_experts, c.num_kv_heads, c.head_dim
        scores = scores_of(self, moe, x_BxQxD, real_BxQ, training=training, decoding=max_length is not None)
        choices = choices_of(self, moe, scores, real_BxQ)
        if self.is_initializing():
            experts = nn.vmap(
                _Projections,
                variable_axes={'params': 0},
                split_rngs={'params': True},
                axis_size=moe.num_experts,
                metadata_params={nn.PARTITION_NAME: 'expert'},
            )
            experts(M * N, c.dtype, name='expert')(jnp.zeros((moe.num_experts, 1, D), c.dtype))

        # Each choice is a token with one expert, so that both projections are dropless layers without a sum over choices. Among
        # shards of experts, a token travels once for each choice.
        def project(part: str, x_BxRxD: jax.Array, weight_BxRx1: jax.Array, width: int) -> jax.Array:
            if self.is_initializing():
                return jnp.zeros((*x_BxRxD.shape[:-1], width), x_BxRxD.dtype)
            params = self.get_variable('params', 'expert')[part]

            def experts(params: dict[str, jax.Array], x_RxD: jax.Array, sizes_E: jax.Array) -> jax.Array:
                return _projection(part, width, c.dtype, parent=None).apply({'params': params}, x_RxD, sizes_E)

            chosen = Choices(choices.expert_GxSxK.reshape(B, Q * K, 1), weight_BxRx1)
            operands = experts, params, x_BxRxD, chosen, moe, scores.mesh
            return ragged.exchange_and_apply(*operands, Exchange.RING, width)[0]

        weight_BxRx1 = choices.weight_GxSxK.reshape(B, Q * K, 1)
        query_BxRxW = project('query', jnp.repeat(x_BxQxD, K, axis=1), jnp.ones_like(weight_BxRx1), M * N)
        query_BxQxKMxN = self._heads(query_BxRxW.reshape(B, Q, K * M * N), 'query_norm')
        # Head m of every choice uses key head m, and query heads of a key head are adjacent in `attention`.
        query_BxQxMKxN = query_BxQxKMxN.reshape(B, Q, K, M, N).swapaxes(2, 3).reshape(B, Q, M * K, N)
        y_BxQxMKxN = self._attend(query_BxQxMKxN, x_BxQxD, position_BxQ, visible, index, max_length)
        y_BxRxW = y_BxQxMKxN.reshape(B, Q, M, K, N).swapaxes(2, 3).reshape(B, Q * K, M * N)
        y_BxQxKxD = project('out', y_BxRxW, weight_BxRx1, D).reshape(B, Q, K, D)
        y_BxQxD = y_BxQxKxD.astype(jnp.float32).sum(axis=2).astype(x_BxQxD.dtype)
        return with_output_bias(self, y_BxQxD) if c.moe_output_bias else y_BxQxD


def _projection(part: str, width: int, dtype: str, **module: object) -> Dense:
    """Returns the projection of an expert, or of all at once, to queries ('query') or to the output ('out')."""
    axes = ('mlp_embed', 'joined_kv') if part == 'query' else ('joined_kv', 'mlp_embed')
    return Dense(width, axes, dtype=dtype, kernel_init=kernel_init, **module)


class _Projections(nn.Module):
    """The parameters of one expert."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x_NxD: jax.Array) -> jax.Array:
        project = functools.partial(_projection, dtype=self.dtype)
        query_NxW = project('query', self.width, name='query')(x_NxD)
        return project('out', x_NxD.shape[-1], name='out')(query_NxW)


class RouterOnly(nn.Module):
    """The router of attention experts, which sows its choices as an MoE layer does; it returns its input."""

    config: TopK

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, real_BxL: jax.Array, *, training: bool) -> jax.Array:
        """See `MoELayer.__call__`."""
        scores = scores_of(self, self.config, x_BxLxD, real_BxL, training=training, decoding=False)
        choices_of(self, self.config, scores, real_BxL)
        return x_BxLxD


def refusals(config: 'DecoderConfig') -> Iterator[str]:
    """Yields a sentence for each setting that contradicts `attention_moe`."""
    moe = config.attention_moe
    if not isinstance(moe, TopK) or not moe.dropless:
        yield "ATTENTION_MOE must have ROUTER = 'top_k' and DISPATCH = 'ragged': every token needs all of its query heads."
        return
    if config.num_heads != moe.num_selected_experts * config.num_kv_heads:
        yield (
            f'NUM_HEADS = {config.num_heads} must be NUM_SELECTED_EXPERTS of ATTENTION_MOE times NUM_KV_HEADS = '
            f'{moe.num_selected_experts} * {config.num_kv_heads}, the query heads of a token.'
        )
    if config.qkv_bias or config.out_bias or config.qk_norm == 'projection':
        yield (
            'ATTENTION_MOE has no biases of its projections and no norm over all heads: set QKV_BIAS = False, OUT_BIAS = False '
            "and QK_NORM = 'none' or 'head'."
        )
    if moe.num_shared_experts or moe.granularity > 1 or moe.expert_mlp_dim is not None:
        yield (
            'ATTENTION_MOE has experts of num_kv_heads heads each, without shared ones: remove num_shared_experts, granularity '
            'and expert_mlp_dim.'
        )
