"""T5X's beam search for any model with a key/value cache; the decoding step of T5.

Shape suffixes: `B` rows of a batch, `N` decodes (beams) of a row, `L` length, `V` vocabulary. A model sees a batch of `B * N`
sequences, the decodes of a row adjacent.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from upcycle.errors import UserError
from upcycle.models.generation import PAD_ID, Cache, Sampling, TokensToLogits, sample

FIRST_ID = PAD_ID  # the decoder's first input
EOS_ID = 1


def brevity_penalty(alpha: float, length: jax.Array | int) -> jax.Array:
    """Returns the divisor of a log-probability that keeps short sequences from winning: Wu et al. 2016, eq. 14."""
    return jnp.power((5.0 + length) / 6.0, alpha)


class _Beams(NamedTuple):
    step: jax.Array
    live_BxNxL: jax.Array  # starts with the first input, so L is one more than is returned; undefined for missing beams
    live_score_BxN: jax.Array  # log-probability; -inf for missing beams
    ended_BxNxL: jax.Array
    ended_score_BxN: jax.Array  # log-probability over brevity penalty; -inf for missing sequences
    cache: Cache


def beam_search(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    *,
    batch_size: int,
    num_decodes: int,
    max_length: int,
    alpha: float = 0.6,
    eos_id: int = EOS_ID,
) -> tuple[jax.Array, jax.Array]:
    """Runs T5X's beam search. Ended sequences rank by log-probability / ((5 + length) / 6)^alpha, end token included.

    As in T5X, every step considers the 2N most probable continuations of a row's live beams. Those that end compete with the
    ended sequences, and the N best others stay live. The search stops when no live beam, even if all its further tokens were
    certain, could beat its row's worst ended sequence. So a beam of 1 differs from greedy decoding: it also considers an end
    token that ranks second, and continues past one that ranks first. Unlike in T5X, if fewer than N sequences ended, the best
    live ones, truncated at `max_length`, follow them.

    Args:
      tokens_to_logits: one step of the model, for B * N sequences.
      cache: empty, for B * N sequences.
      batch_size: B.
      num_decodes: N.
      max_length: L, the most tokens to generate, end token included.
      alpha: strength of the brevity penalty; 0 compares plain log-probabilities.
      eos_id: the end token.

    Returns:
      Tokens (B, N, L), best first, with padding after the end, and scores (B, N), -inf for missing sequences.

    Raises:
      UserError: alpha is negative, so that the search would not know when to stop.
    """
    if alpha < 0:
        raise UserError(f'ALPHA = {alpha} would favour short sequences: set it to 0 or more (0.6 in T5X).')
    B, N = batch_size, num_decodes

    def reorder(leaf: jax.Array, beam_BxN: jax.Array) -> jax.Array:
        return _take(leaf.reshape(B, N, *leaf.shape[1:]), beam_BxN).reshape(leaf.shape) if leaf.ndim else leaf

    def improvable(s: _Beams) -> jax.Array:
        bound_B = s.live_score_BxN.max(axis=1) / brevity_penalty(alpha, max_length)
        return (s.step < max_length) & jnp.any(bound_B > s.ended_score_BxN.min(axis=1))

    def advance(s: _Beams) -> _Beams:
        token_BxNx1 = jax.lax.dynamic_slice_in_dim(s.live_BxNxL, s.step, 1, axis=2)
        logits_BNxV, cache = tokens_to_logits(token_BxNx1.reshape(B * N, 1), s.cache)
        log_prob_BxNxV = jax.nn.log_softmax(logits_BNxV.astype(jnp.float32)).reshape(B, N, -1)
        log_prob_BxNxV += s.live_score_BxN[..., None]
        V = log_prob_BxNxV.shape[-1]
        # One continuation of each beam ends, so at least N of 2N do not.
        score_Bx2N, candidate_Bx2N = jax.lax.top_k(log_prob_BxNxV.reshape(B, N * V), 2 * N)
        beam_Bx2N, token_Bx2N = candidate_Bx2N // V, candidate_Bx2N % V
        tokens_Bx2NxL = _take(s.live_BxNxL, beam_Bx2N).at[:, :, s.step + 1].set(token_Bx2N)
        ends_Bx2N = token_Bx2N == eos_id

        live_score_BxN, lives_BxN = jax.lax.top_k(jnp.where(ends_Bx2N, -jnp.inf, score_Bx2N), N)
        beam_BxN = _take(beam_Bx2N, lives_BxN)
        new_score_Bx2N = jnp.where(ends_Bx2N, score_Bx2N / brevity_penalty(alpha, s.step + 1), -jnp.inf)
        score_Bx3N = jnp.concatenate([s.ended_score_BxN, new_score_Bx2N], axis=1)
        ended_score_BxN, stays_BxN = jax.lax.top_k(score_Bx3N, N)
        live_BxNxL = _take(tokens_Bx2NxL, lives_BxN)
        ended_BxNxL = _take(jnp.concatenate([s.ended_BxNxL, tokens_Bx2NxL], axis=1), stays_BxN)
        cache = jax.tree.map(lambda leaf: reorder(leaf, beam_BxN), cache)
        return _Beams(s.step + 1, live_BxNxL, live_score_BxN, ended_BxNxL, ended_score_BxN, cache)

    empty_BxNxL = jnp.full((B, N, max_length + 1), PAD_ID, jnp.int32)
    none_BxN = jnp.full((B, N), -jnp.inf)
    # Only one live beam: N equal ones would stay equal.
    one_BxN = none_BxN.at[:, 0].set(0.0)
    start = _Beams(jnp.zeros((), jnp.int32), empty_BxNxL, one_BxN, empty_BxNxL, none_BxN, cache)
    end = jax.lax.while_loop(improvable, advance, start)

    live_score_BxN = end.live_score_BxN / brevity_penalty(alpha, max_length)
    score_Bx2N = jnp.concatenate([end.ended_score_BxN, live_score_BxN], axis=1)
    live_Bx2N = jnp.concatenate([jnp.isneginf(end.ended_score_BxN), jnp.ones((B, N), bool)], axis=1)
    best_BxN = jnp.lexsort((-score_Bx2N, live_Bx2N), axis=1)[:, :N]
    tokens_Bx2NxL = jnp.concatenate([end.ended_BxNxL, end.live_BxNxL], axis=1)
    return _take(tokens_Bx2NxL, best_BxN)[:, :, 1:], _take(score_Bx2N, best_BxN)


def _take(x_BxN: jax.Array, index_BxM: jax.Array) -> jax.Array:
    # Row by row, so that a sharded batch is not gathered onto each device.
    return jax.vmap(lambda x, index: x[index])(x_BxN, index_BxM)


def t5_start(
    transformer: nn.Module, params: Any, encoder_input_tokens: jax.Array, *, max_length: int, num_decodes: int = 1
) -> tuple[Any, Cache]:
    """Runs the encoder of a T5 on B rows; returns what does not change in decoding, and the empty cache, for B * N sequences.

    Keys and values of the encoder's output are repeated for a row's decodes once, here, and are not part of the cache that a
    search reorders.
    """

    def repeat(leaf: jax.Array) -> jax.Array:
        return jnp.repeat(leaf, num_decodes, axis=0) if leaf.ndim else leaf

    encoded = transformer.apply({'params': params}, encoder_input_tokens, method='encode')
    empty_BxL = jnp.full((encoder_input_tokens.shape[0], max_length), PAD_ID, jnp.int32)
    # Jitted, so that of this call over the full length only the cache is computed, not the logits.
    apply = functools.partial(_decode, transformer, params, {}, max_length=max_length)
    cache = jax.jit(lambda *tokens: apply(*tokens)[1])(encoded, encoder_input_tokens, empty_BxL)
    cache, encoder = jax.tree.map(repeat, (cache, (encoded, encoder_input_tokens)))
    keys = {path: leaf for path, leaf in cache.items() if 'encoder_decoder_attention' in path}
    return (encoder, keys), {path: leaf for path, leaf in cache.items() if path not in keys}


def t5_decode(
    transformer: nn.Module, params: Any, fixed: Any, tokens_BNx1: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Computes the logits (B * N, V) of the next tokens of a T5; `fixed` and `cache` are those of `t5_start`."""
    encoder, keys = fixed
    max_length = next(leaf.shape[1] for leaf in cache.values() if leaf.ndim)
    logits_BNx1xV, written = _decode(transformer, params, cache | keys, *encoder, tokens_BNx1, max_length=max_length)
    return logits_BNx1xV[:, 0], {path: leaf for path, leaf in written.items() if path not in keys}


def _decode(
    transformer: nn.Module, params: Any, cache: Cache, *tokens: jax.Array, max_length: int
) -> tuple[jax.Array, Cache]:
    variables = {'params': params} | ({'cache': unflatten_dict(cache)} if cache else {})
    options = {'decoding': True, 'max_length': max_length, 'mutable': ['cache'], 'method': 'decode'}
    logits, written = transformer.apply(variables, *tokens, **options)
    return logits, flatten_dict(written['cache'])


def t5_step(
    transformer: nn.Module, params: Any, encoder_input_tokens: jax.Array, *, max_length: int, num_decodes: int
) -> tuple[TokensToLogits, Cache]:
    """Runs the encoder on B rows; returns the decoding step of a T5 and its empty cache for B * N sequences."""
    sizes = {'max_length': max_length, 'num_decodes': num_decodes}
    fixed, cache = t5_start(transformer, params, encoder_input_tokens, **sizes)
    return functools.partial(t5_decode, transformer, params, fixed), cache


def generate(
    transformer: nn.Module,
    params: Any,
    encoder_input_tokens: jax.Array,
    *,
    max_length: int,
    num_decodes: int = 1,
    alpha: float = 0.6,
    temperature: float = 0.0,
    top_k: int = 0,
    rng: jax.Array | None = None,
    eos_id: int = EOS_ID,
) -> tuple[jax.Array, jax.Array]:
    """Generates sequences of a `models.t5.Transformer` by sampling (temperature > 0), greedily (one decode) or by beam search.

    Pure. For `jax.jit` all arguments are static except `params`, the (B, length) tokens (0 at padding) and `rng`.

    Returns:
      Tokens (B, N, L), best first, with padding after the end, and scores (B, N): log-probabilities, for beam search over the
      brevity penalty. For arguments and errors see `Sampling`, `sample` and `beam_search`.
    """
    B, N, L = encoder_input_tokens.shape[0], num_decodes, max_length
    step = t5_step(transformer, params, encoder_input_tokens, max_length=L, num_decodes=N)
    if N > 1 and temperature == 0:
        return beam_search(*step, batch_size=B, num_decodes=N, max_length=L, alpha=alpha, eos_id=eos_id)
    sampling = Sampling(temperature, top_k, eos_ids=(eos_id,))
    first_BN = jnp.full(B * N, FIRST_ID, jnp.int32)
    tokens_BNxL, _, score_BN = sample(*step, sampling, first_B=first_BN, max_length=L, key=rng)
    score_BxN, order_BxN = jax.lax.top_k(score_BN.reshape(B, N), N)
    return _take(tokens_BNxL.reshape(B, N, L), order_BxN), score_BxN
