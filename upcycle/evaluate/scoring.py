"""What benchmarks ask of a language model: log-likelihoods of continuations, of whole texts, and generated text.

No benchmark library is needed here; `harness.py` connects this to one. Shape suffixes: `B` sequences, `L` length, `V` vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from upcycle import partitioning
from upcycle.errors import UserError
from upcycle.models import Params, generation
from upcycle.models.generation import Sampling
from upcycle.models.losses import cross_entropy
from upcycle.progress import counted

if TYPE_CHECKING:
    from upcycle.models.protocol import Continuing

Tokens = Sequence[int]
# (context, continuation), both of at least one token.
Pair = tuple[Tokens, Tokens]
SHORTEST = 32  # static length of the shortest rows


class Scored(NamedTuple):
    """A continuation after its context.

    Attributes:
      log_likelihood: the sum of its tokens' log-probabilities, in nats.
      is_greedy: whether each of its tokens is the most probable one.
    """

    log_likelihood: float
    is_greedy: bool


def rolling_windows(tokens: Tokens, prefix: int, max_length: int) -> list[Pair]:
    """Cuts a text into pairs whose continuations are each token once, as lm-eval does.

    Args:
      tokens: of the text.
      prefix: context of the first token.
      max_length: the most tokens that the model reads at once. The last window has a context of as many as fit.
    """
    text = [prefix, *tokens]
    windows = []
    for first in range(0, len(tokens), max_length):
        last = min(first + max_length, len(tokens))
        # The input of the window ends before its last token.
        start = max(last - max_length, 0)
        windows.append((text[start : first + 1], text[first + 1 : last + 1]))
    return windows


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores and continues texts in batches of a few static shapes, on the mesh in use; MoE layers drop no token.

    Every process passes the same texts, and gets all results.

    Attributes:
      model: a language model that continues texts.
      params: of the model.
      sharding: of batches, see `partitioning.batch_sharding`.
      batch_size: rows of a batch, a multiple of the parts of the mesh.
      max_length: the most tokens that the model reads at once.
    """

    model: 'Continuing'
    params: Params
    sharding: jax.sharding.NamedSharding
    batch_size: int
    max_length: int

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[Scored]:
        """Scores continuations. Of a context, the last tokens that fit are read.

        Raises:
          UserError: a continuation is longer than `max_length`.
        """
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self.max_length:
            raise UserError(
                f'a continuation has {longest} tokens, more than the {self.max_length} that the model reads: raise --max_length.'
            )
        rows = [[*context, *continuation][-self.max_length - 1 :] for context, continuation in pairs]
        scored: list[Any] = [None] * len(pairs)
        batches = list(self._batches([len(row) - 1 for row in rows], self.max_length))
        for numbers, length in counted(batches, 'log-likelihoods'):
            shape = (self.batch_size, length)
            batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'targets')}
            batch |= {name: np.zeros(shape, bool) for name in ('mask', 'counts')}
            batch['mask'][:, 0] = True  # rows that fill the batch
            for i, number in enumerate(numbers):
                row, last = rows[number], len(rows[number]) - 1
                batch['tokens'][i, :last], batch['targets'][i, :last] = row[:-1], row[1:]
                batch['mask'][i, :last] = True
                batch['counts'][i, last - len(pairs[number][1]) : last] = True
            sums_B, greedy_B = jax.device_get(_score(self.params, self._put(batch), model=self.model))
            for number, total, greedy in zip(numbers, sums_B, greedy_B, strict=False):
                scored[number] = Scored(float(total), bool(greedy))
        return scored

    def rolling(self, texts: Sequence[Tokens], prefix: int) -> list[float]:
        """Returns the log-likelihood of each text after `prefix`, see `rolling_windows`; 0 for an empty text."""
        windows = [rolling_windows(text, prefix, self.max_length) for text in texts]
        scores = iter(self.log_likelihoods([pair for pairs in windows for pair in pairs]))
        return [sum((next(scores).log_likelihood for _ in pairs), 0.0) for pairs in windows]

    def generate_until(
        self,
        prompts: Sequence[Tokens],
        stops: Sequence[str],
        sampling: Sampling,
        max_new_tokens: int,
        decode: Callable[..., str],
        seed: int = 0,
    ) -> list[str]:
        """Continues prompts until a stop string, an end token or `max_new_tokens`.

        Of a prompt, the last tokens that fit are read.

        Args:
          prompts: each of at least one token.
          stops: strings that end a text, and are not a part of it; also those of special tokens.
          sampling: how tokens are chosen, and which end a text.
          max_new_tokens: the most tokens of a text.
          decode: returns the text of tokens, see `Tokenizer.decode`.
          seed: of the draws.

        Returns:
          The new texts, without special tokens.

        Raises:
          UserError: the new tokens leave no room for a prompt.
        """
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f'{max_new_tokens} new tokens leave no room for a prompt in the {self.max_length} that the model reads: raise '
                '--max_length, or lower max_gen_toks of the task.'
            )
        prompts = [prompt[-room:] for prompt in prompts]
        stops = [stop for stop in stops if stop]
        texts = [''] * len(prompts)
        batches = list(self._batches([len(prompt) for prompt in prompts], room))
        for count, (numbers, length) in enumerate(counted(batches, 'generation')):
            batch = {
                'tokens': np.zeros((self.batch_size, length), np.int32),
                'mask': np.zeros((self.batch_size, length), bool),
            }
            batch['mask'][:, -1] = True
            for i, number in enumerate(numbers):
                size = len(prompts[number])
                batch['tokens'][i, length - size :], batch['mask'][i, length - size :] = prompts[number], True
            put = self._put(batch)
            key = jax.random.fold_in(jax.random.key(seed), count)
            steps = generation.stream(
                self.model, self.params, put['tokens'], put['mask'], sampling, max_new_tokens, key
            )
            for number, text in zip(numbers, _until(steps, len(numbers), stops, sampling, decode), strict=True):
                texts[number] = text
        return texts

    def _batches(self, lengths: Sequence[int], most: int) -> Iterator[tuple[list[int], int]]:
        """Yields the numbers of the rows of each batch, and its static length: a power of 2, or `most`; the longest first."""
        by_length: dict[int, list[int]] = {}
        for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            static = min(max(SHORTEST, 1 << (lengths[number] - 1).bit_length()), most)
            by_length.setdefault(static, []).append(number)
        for static, numbers in by_length.items():
            for first in range(0, len(numbers), self.batch_size):
                yield numbers[first : first + self.batch_size], static

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return partitioning.put_batch(batch, self.sharding)


@functools.partial(jax.jit, static_argnames='model')
def _score(params: Params, batch: dict[str, jax.Array], *, model: 'Continuing') -> tuple[jax.Array, jax.Array]:
    """Returns the log-likelihood of the targets that count in each row, float32 (B,), and whether all are most probable, (B,)."""
    logits_BxLxV = model.teacher_forced(params, batch['tokens'], batch['mask'])
    loss_BxL, _ = cross_entropy(logits_BxLxV, batch['targets'])
    best_BxL = (logits_BxLxV.argmax(axis=-1) == batch['targets']) | ~batch['counts']
    return generation.on_every_host((-jnp.where(batch['counts'], loss_BxL, 0.0).sum(axis=-1), best_BxL.all(axis=-1)))


def _until(
    steps: Iterator[tuple[np.ndarray, np.ndarray]],
    rows: int,
    stops: Sequence[str],
    sampling: Sampling,
    decode: Callable[..., str],
) -> list[str]:
    """Returns the texts of the first rows of a stream, which is left when each has a stop string or has ended."""
    tokens: list[list[int]] = [[] for _ in range(rows)]
    going = set(range(rows))
    for token_B, real_B in steps:
        for row in [*going]:
            token = int(token_B[row])
            if not real_B[row] or token in sampling.eos_ids:
                going.discard(row)
                continue
            tokens[row].append(token)
            text = decode(tokens[row], special=True) if stops else ''
            if any(stop in text for stop in stops):
                going.discard(row)
        if not going:
            break
    return [_before(decode(row, special=False), stops) for row in tokens]


def _before(text: str, stops: Sequence[str]) -> str:
    return text[: min([len(text), *(at for stop in stops if (at := text.find(stop)) >= 0)])]
