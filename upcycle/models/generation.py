"""Generation for any model with a key/value cache: how a token is chosen, the loop over tokens, and a stream of them.

Shape suffixes: `B` sequences, `L` length, `V` vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle.errors import UserError

if TYPE_CHECKING:
    from upcycle.models.protocol import Generative, Model, Params

# Arrays with a leading axis of B, and scalars, which all sequences share.
Cache = Any
# (tokens (B, 1), cache) -> (logits (B, V) of the next token, cache with this position added).
TokensToLogits = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]

PAD_ID = 0  # what follows the end of a sequence


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and which ones end a sequence. The filters apply in the order of the attributes.

    Attributes:
      temperature: divides the logits; 0 chooses the most probable token.
      top_k: draws among this many most probable tokens; 0 for all.
      top_p: draws among the fewest most probable tokens whose probabilities sum to at least this; 1 for all.
      eos_ids: tokens that end a sequence.

    Raises:
      UserError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, 'eos_ids', tuple(map(int, self.eos_ids)))
        # Negated, so that nan is refused too.
        if not 0 <= self.temperature < float('inf'):
            raise UserError(f'temperature = {self.temperature:g} must be a number of at least 0; 0 decodes greedily.')
        if self.top_k < 0:
            raise UserError(f'top_k = {self.top_k} must be at least 0; 0 keeps all tokens.')
        if not 0 < self.top_p <= 1:
            raise UserError(f'top_p = {self.top_p:g} must be above 0 and at most 1; 1 keeps all tokens.')

    def choose(self, logits_BxV: jax.Array, key: jax.Array, step: jax.Array) -> jax.Array:
        """Chooses a token for each sequence, (B,). A sequence's draws depend on key, row and step, and not on other rows."""
        if self.temperature == 0:
            return jnp.argmax(logits_BxV, axis=-1)
        logits_BxV = self.filtered(logits_BxV)

        def draw(row: jax.Array, logits_V: jax.Array) -> jax.Array:
            return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), step), logits_V)

        return jax.vmap(draw)(jnp.arange(len(logits_BxV)), logits_BxV)

    def filtered(self, logits_BxV: jax.Array) -> jax.Array:
        """Returns the logits at a temperature above 0, -inf for tokens that are not drawn."""
        logits_BxV = logits_BxV / self.temperature
        if 0 < self.top_k < logits_BxV.shape[-1]:
            least_Bx1 = jax.lax.top_k(logits_BxV, self.top_k)[0][:, -1:]
            logits_BxV = jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
        if self.top_p < 1:
            sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
            probs_BxV = jax.nn.softmax(sorted_BxV)
            before_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV
            least_Bx1 = jnp.where(before_BxV < self.top_p, sorted_BxV, jnp.inf).min(axis=-1, keepdims=True)
            logits_BxV = jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
        return logits_BxV


class Generated(NamedTuple):
    """New tokens of B sequences.

    Attributes:
      tokens: int32 (B, L), `PAD_ID` after the end.
      lengths: int32 (B,), the number of tokens of each sequence, its end token included.
      scores: float32 (B,), their log-probability under the model, at temperature 1 and without filters.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


class _State(NamedTuple):
    step: jax.Array
    input_B: jax.Array  # the token that the model reads next
    generated: Generated
    ended_B: jax.Array
    cache: Cache


def _start(first_B: jax.Array, cache: Cache, max_length: int) -> _State:
    B = len(first_B)
    empty = Generated(jnp.full((B, max_length), PAD_ID, jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B))
    return _State(jnp.zeros((), jnp.int32), first_B.astype(jnp.int32), empty, jnp.zeros(B, bool), cache)


def _advance(tokens_to_logits: TokensToLogits, sampling: Sampling, key: jax.Array, s: _State) -> _State:
    """Generates one token of each sequence that has not ended."""
    logits_BxV, cache = tokens_to_logits(s.input_B[:, None], s.cache)
    log_prob_BxV = jax.nn.log_softmax(logits_BxV.astype(jnp.float32))
    token_B = jnp.where(s.ended_B, PAD_ID, sampling.choose(log_prob_BxV, key, s.step)).astype(jnp.int32)
    log_prob_B = jnp.take_along_axis(log_prob_BxV, token_B[:, None], axis=1)[:, 0]
    tokens_BxL, length_B, score_B = s.generated
    generated = Generated(
        jax.lax.dynamic_update_slice_in_dim(tokens_BxL, token_B[:, None], s.step, axis=1),
        length_B + ~s.ended_B,
        score_B + jnp.where(s.ended_B, 0.0, log_prob_B),
    )
    ends_B = jnp.isin(token_B, jnp.array(sampling.eos_ids, jnp.int32))
    return _State(s.step + 1, token_B, generated, s.ended_B | ends_B, cache)


def sample(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    sampling: Sampling,
    *,
    first_B: jax.Array,
    max_length: int,
    key: jax.Array | None = None,
) -> Generated:
    """Generates sequences, greedily or by sampling, until all have ended.

    Args:
      tokens_to_logits: one step of the model.
      cache: of B sequences, with all positions before the first.
      sampling: how tokens are chosen.
      first_B: the token of each sequence that the model reads first.
      max_length: L, the most tokens to generate, end token included.
      key: of the draws; may be None if the temperature is 0.

    Raises:
      UserError: sampling without a key.
    """
    if sampling.temperature > 0 and key is None:
        raise UserError(f'temperature = {sampling.temperature:g} draws tokens: pass a key, or set it to 0.')
    end = jax.lax.while_loop(
        lambda s: (s.step < max_length) & ~s.ended_B.all(),
        functools.partial(_advance, tokens_to_logits, sampling, key),
        _start(first_B, cache, max_length),
    )
    return end.generated


def generate(
    model: 'Generative', params: 'Params', tokens: Any, mask: Any, sampling: Sampling, max_new_tokens: int, key: Any
) -> Generated:
    """Generates continuations of prompts; see `models.Model.generate`."""
    tokens, mask, key = _prepared(model, tokens, mask, max_new_tokens, key)
    return _generate(params, tokens, mask, key, model=model, sampling=sampling, max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnames=('model', 'sampling', 'max_new_tokens'))
def _generate(
    params: 'Params',
    tokens: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    *,
    model: 'Generative',
    sampling: Sampling,
    max_new_tokens: int,
) -> Generated:
    first_B, cache = _prefilled(model, params, tokens, mask, max_new_tokens)
    step = functools.partial(model.decode, params)
    return sample(step, cache, sampling, first_B=first_B, max_length=max_new_tokens, key=key)


def stream(
    model: 'Generative', params: 'Params', tokens: Any, mask: Any, sampling: Sampling, max_new_tokens: int, key: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Generates what `generate` does, step by step.

    Yields:
      The next token of each sequence, int32 (B,), and whether it has one, bool (B,): False after its end token.
    """
    tokens, mask, key = _prepared(model, tokens, mask, max_new_tokens, key)
    state = _first_state(params, tokens, mask, model=model, max_new_tokens=max_new_tokens)
    ended_B = np.zeros(len(tokens), bool)
    for _ in range(max_new_tokens):
        state, shown = _next_state(params, state, key, model=model, sampling=sampling)
        real_B = ~ended_B
        token_B, ended_B = jax.device_get(shown)
        yield token_B, real_B
        if ended_B.all():
            return


@functools.partial(jax.jit, static_argnames=('model', 'max_new_tokens'))
def _first_state(
    params: 'Params', tokens: jax.Array, mask: jax.Array, *, model: 'Generative', max_new_tokens: int
) -> _State:
    return _start(*_prefilled(model, params, tokens, mask, max_new_tokens), max_new_tokens)


@functools.partial(jax.jit, static_argnames=('model', 'sampling'), donate_argnames='state')
def _next_state(
    params: 'Params', state: _State, key: jax.Array, *, model: 'Generative', sampling: Sampling
) -> tuple[_State, tuple[jax.Array, jax.Array]]:
    state = _advance(functools.partial(model.decode, params), sampling, key, state)
    return state, on_every_host((state.input_B, state.ended_B))


def on_every_host(tree: Any) -> Any:
    """Replicates arrays within a program, so that every process can read all of them."""
    return jax.tree.map(lambda leaf: nn.with_logical_constraint(leaf, (None,) * leaf.ndim), tree)


def _prefilled(
    model: 'Generative', params: 'Params', tokens_BxL: jax.Array, mask_BxL: jax.Array, max_new_tokens: int
) -> tuple[jax.Array, Cache]:
    """Moves padding to the front, and reads the prompts."""
    order_BxL = jnp.argsort(mask_BxL, axis=1, stable=True)
    tokens_BxL, mask_BxL = (jnp.take_along_axis(x, order_BxL, axis=1) for x in (tokens_BxL, mask_BxL))
    return model.prefill(params, tokens_BxL, mask_BxL, max_new_tokens)


def require_text(model: 'Model | type[Model]') -> None:
    """Raises UserError unless the model's family generates text."""
    if model.prompts is None:
        raise UserError(f'a {model.title} generates no text: name a language model.')


def _prepared(
    model: 'Generative', tokens: Any, mask: Any, max_new_tokens: int, key: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checks the arguments of `generate`.

    Raises:
      UserError: the model generates no text, an argument has the wrong type or shape, or a prompt has no token.
    """
    require_text(model)
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(
            f'tokens has type {tokens.dtype.name} and shape {tokens.shape}, but must hold whole numbers (batch, length), at '
            'least one.'
        )
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask) != 0
    if mask.shape != tokens.shape:
        raise UserError(f'mask has shape {mask.shape}, but must have that of tokens, {tokens.shape}.')
    if not isinstance(mask, jax.core.Tracer) and mask.is_fully_addressable:
        empty = np.flatnonzero(~np.asarray(mask).any(axis=1))
        if empty.size:
            raise UserError(f'row {empty[0]} of the prompts has no token: remove it.')
    if max_new_tokens < 1:
        raise UserError(f'max_new_tokens = {max_new_tokens} must be at least 1.')
    return tokens, mask, jax.random.key(key) if isinstance(key, int | np.integer) else key
