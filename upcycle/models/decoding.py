"""Generation with a key/value cache: greedy, sampling and T5X's beam search for any model; the decoding step of T5.

Shape suffixes: `B` rows of a batch, `N` decodes (beams) of a row, `L` length, `V` vocabulary. A model sees a batch of `B * N`
sequences, the decodes of a row adjacent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from upcycle.errors import UserError

# Arrays with a leading axis of B * N, and scalars, which all decodes share.
Cache = Any
# (tokens (B * N, 1), cache) -> (logits (B * N, V) of the next token, cache with this position added).
TokensToLogits = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]

PAD_ID = 0  # also the decoder's first input
EOS_ID = 1


def brevity_penalty(alpha: float, length: jax.Array | int) -> jax.Array:
    """Returns the divisor of a log-probability that keeps short sequences from winning: Wu et al. 2016, eq. 14."""
    return jnp.power((5.0 + length) / 6.0, alpha)


class _Samples(NamedTuple):
    step: jax.Array
    tokens_BxL: jax.Array  # starts with the decoder's first input, so L is one more than is returned
    score_B: jax.Array
    ended_B: jax.Array
    cache: Cache


def sample(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    *,
    batch_size: int,
    max_length: int,
    temperature: float = 0.0,
    top_k: int = 0,
    rng: jax.Array | None = None,
    eos_id: int = EOS_ID,
) -> tuple[jax.Array, jax.Array]:
    """Generates sequences, greedily or by sampling.

    Args:
      tokens_to_logits: one step of the model.
      cache: empty, for B sequences.
      batch_size: B; every sequence is a row.
      max_length: L, the most tokens to generate, end token included.
      temperature: divides logits before sampling; 0 for greedy decoding.
      top_k: sample among this many most probable tokens; 0 for all.
      rng: key, required for sampling.
      eos_id: the end token.

    Returns:
      Tokens (B, L) with padding after the end, and their log-probability (B,) under the model (at temperature 1).

    Raises:
      UserError: sampling without a key.
    """
    if temperature > 0 and rng is None:
        raise UserError(f'TEMPERATURE = {temperature} samples tokens: pass a key as `rng`, or set it to 0.')

    def unfinished(s: _Samples) -> jax.Array:
        return (s.step < max_length) & ~s.ended_B.all()

    def advance(s: _Samples) -> _Samples:
        token_Bx1 = jax.lax.dynamic_slice_in_dim(s.tokens_BxL, s.step, 1, axis=1)
        logits_BxV, cache = tokens_to_logits(token_Bx1, s.cache)
        log_prob_BxV = jax.nn.log_softmax(logits_BxV.astype(jnp.float32))
        if temperature == 0:
            token_B = jnp.argmax(log_prob_BxV, axis=-1)
        else:
            least_Bx1 = jax.lax.top_k(log_prob_BxV, top_k)[0][:, -1:] if top_k else -jnp.inf
            open_BxV = jnp.where(log_prob_BxV >= least_Bx1, log_prob_BxV / temperature, -jnp.inf)
            token_B = jax.random.categorical(jax.random.fold_in(rng, s.step), open_BxV)
        token_B = jnp.where(s.ended_B, PAD_ID, token_B)
        log_prob_B = jnp.take_along_axis(log_prob_BxV, token_B[:, None], axis=1)[:, 0]
        tokens_BxL = s.tokens_BxL.at[:, s.step + 1].set(token_B)
        score_B = s.score_B + jnp.where(s.ended_B, 0.0, log_prob_B)
        return _Samples(s.step + 1, tokens_BxL, score_B, s.ended_B | (token_B == eos_id), cache)

    B = batch_size
    empty_BxL = jnp.full((B, max_length + 1), PAD_ID, jnp.int32)
    start = _Samples(jnp.zeros((), jnp.int32), empty_BxL, jnp.zeros(B), jnp.zeros(B, bool), cache)
    end = jax.lax.while_loop(unfinished, advance, start)
    return end.tokens_BxL[:, 1:], end.score_B


class _Beams(NamedTuple):
    step: jax.Array
    live_BxNxL: jax.Array  # L as in `_Samples`; undefined for missing beams
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
      tokens_to_logits, batch_size, max_length, eos_id: as for `sample`.
      cache: empty, for B * N sequences.
      num_decodes: N.
      alpha: strength of the brevity penalty; 0 compares plain log-probabilities.

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


def t5_step(
    transformer: nn.Module, params: Any, encoder_input_tokens: jax.Array, *, max_length: int, num_decodes: int
) -> tuple[TokensToLogits, Cache]:
    """Runs the encoder on B rows; returns the decoding step of a T5 and its empty cache for B * N sequences.

    Keys and values of the encoder's output do not change. They are repeated for a row's decodes once, here, and are not part of
    the cache that a search reorders.
    """

    def decode(cache: Cache, *tokens: jax.Array) -> tuple[jax.Array, Cache]:
        variables = {'params': params} | ({'cache': unflatten_dict(cache)} if cache else {})
        options = {'decoding': True, 'max_length': max_length, 'mutable': ['cache'], 'method': 'decode'}
        logits, written = transformer.apply(variables, *tokens, **options)
        return logits, flatten_dict(written['cache'])

    def repeat(leaf: jax.Array) -> jax.Array:
        return jnp.repeat(leaf, num_decodes, axis=0) if leaf.ndim else leaf

    encoded = transformer.apply({'params': params}, encoder_input_tokens, method='encode')
    empty_BxL = jnp.full((encoder_input_tokens.shape[0], max_length), PAD_ID, jnp.int32)
    # Jitted, so that of this call over the full length only the cache is computed, not the logits.
    cache = jax.jit(lambda *tokens: decode({}, *tokens)[1])(encoded, encoder_input_tokens, empty_BxL)
    cache, encoder = jax.tree.map(repeat, (cache, (encoded, encoder_input_tokens)))
    fixed = {path: leaf for path, leaf in cache.items() if 'encoder_decoder_attention' in path}

    def tokens_to_logits(tokens_BNx1: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        logits_BNx1xV, written = decode(cache | fixed, *encoder, tokens_BNx1)
        return logits_BNx1xV[:, 0], {path: leaf for path, leaf in written.items() if path not in fixed}

    return tokens_to_logits, {path: leaf for path, leaf in cache.items() if path not in fixed}


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
      brevity penalty. For arguments and errors see `sample` and `beam_search`.
    """
    B, N, L = encoder_input_tokens.shape[0], num_decodes, max_length
    step = t5_step(transformer, params, encoder_input_tokens, max_length=L, num_decodes=N)
    if N > 1 and temperature == 0:
        return beam_search(*step, batch_size=B, num_decodes=N, max_length=L, alpha=alpha, eos_id=eos_id)
    drawing = {'temperature': temperature, 'top_k': top_k, 'rng': rng}
    tokens_BNxL, score_BN = sample(*step, batch_size=B * N, max_length=L, eos_id=eos_id, **drawing)
    score_BxN, order_BxN = jax.lax.top_k(score_BN.reshape(B, N), N)
    return _take(tokens_BNxL.reshape(B, N, L), order_BxN), score_BxN
