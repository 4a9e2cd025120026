"""T5's span corruption with explicit seeds.

Raffel et al., JMLR 2020, section 3.1.4: 15% of the tokens, in spans of 3 on average, are removed from the inputs. A sentinel
replaces each span, and the targets list the removed spans, each after its sentinel. The sentinels depend on the vocabulary:
see `data/sentinels.py`. `tests/data/test_span_corruption.py` compares the result with the `t5` package bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from upcycle.data import require_lengths, tensorflow_quiet
from upcycle.errors import UserError

tf = tensorflow_quiet.tensorflow()
seqio = tensorflow_quiet.seqio()

if TYPE_CHECKING:
    import tensorflow as tf

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0


class Lengths(NamedTuple):
    """The lengths for a chunk of `tokens` tokens. Inputs and targets include sentinels and EOS."""

    tokens: int
    noise: int
    spans: int
    inputs: int
    targets: int


def corrupted_lengths(tokens: int) -> Lengths:
    """The lengths after corrupting `tokens` >= 2 tokens, with at least one span and one kept token."""
    # t5 draws its masks with float32 arithmetic; halves could round the other way in float64.
    noise = int(np.round(np.float32(tokens) * np.float32(NOISE_DENSITY)))
    noise = min(max(noise, 1), tokens - 1)
    spans = max(int(np.round(np.float32(noise) / np.float32(MEAN_SPAN_LENGTH))), 1)
    return Lengths(tokens, noise, spans, inputs=tokens - noise + spans + 1, targets=noise + spans + 1)


def lengths_for_inputs(inputs: int) -> Lengths:
    """The lengths of the longest chunk whose corrupted inputs fill exactly `inputs` positions."""
    # One more token lengthens the inputs by 0 or 1, so the search ends at the first chunk that is too long.
    tokens = max(inputs - 1, 2)
    while corrupted_lengths(tokens + 1).inputs <= inputs:
        tokens += 1
    return corrupted_lengths(tokens)


def checked_lengths(sequence_length: Mapping[str, int], sentinels: Sequence[int]) -> Lengths:
    """Returns `lengths_for_inputs` after checking the targets and the sentinels.

    Args:
      sequence_length: TASK_FEATURE_LENGTHS, with 'inputs' and 'targets' in tokens.
      sentinels: available ids.

    Raises:
      UserError: the targets would be truncated, or there are fewer sentinels than spans.
    """
    require_lengths(sequence_length or {})
    binding = f'TASK_FEATURE_LENGTHS = {dict(sequence_length)!r}'
    inputs, targets = sequence_length['inputs'], sequence_length['targets']
    if inputs < 4:
        raise UserError(f"{binding} leaves no room for a token, a sentinel and EOS: set 'inputs' to 4 or more.")
    lengths = lengths_for_inputs(inputs)
    if targets < lengths.targets:
        raise UserError(
            f'{binding} would truncate the targets of span corruption, which need {lengths.targets} tokens for inputs of '
            f"{inputs}: set 'targets' to {lengths.targets} or more, or shorten 'inputs'."
        )
    if lengths.spans > len(sentinels):
        raise UserError(
            f'{binding} needs {lengths.spans} sentinels and the vocabulary has {len(sentinels)}: '
            "shorten 'inputs', or set SENTINELS."
        )
    return lengths


def _random_partition(total: int, parts: int, seed: tf.Tensor) -> tf.Tensor:
    """Draws `parts` positive int32 lengths that sum to `total`, uniformly over all such partitions."""
    is_cut = seqio.stateless_shuffle(tf.cast(tf.range(total - 1) < parts - 1, tf.int32), seed)
    cuts = tf.cast(tf.where(is_cut > 0)[:, 0], tf.int32) + 1
    edges = tf.concat([[0], cuts, [total]], axis=0)
    return edges[1:] - edges[:-1]


def noise_mask(length: int, seeds: Any) -> tf.Tensor:
    """Draws the mask of noise tokens. Kept and noise spans alternate, beginning with a kept one.

    Args:
      length: number of tokens, at least 2.
      seeds: two stateless seeds [2, 2], for the lengths of the noise spans and of the kept spans.

    Returns:
      bool [length].
    """
    _, noise, spans, _, _ = corrupted_lengths(length)
    noise_lengths = _random_partition(noise, spans, seeds[0])
    kept_lengths = _random_partition(length - noise, spans, seeds[1])
    turns = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [2 * spans])
    return tf.ensure_shape(tf.repeat(tf.range(2 * spans) % 2 == 1, turns), [length])


def spans_to_sentinels(tokens: tf.Tensor, mask: tf.Tensor, sentinels: Sequence[int]) -> tf.Tensor:
    """Replaces every run of True in `mask` by the next sentinel."""
    is_first = mask & ~tf.pad(mask[:-1], [[1, 0]])
    number = tf.maximum(tf.cumsum(tf.cast(is_first, tf.int32)) - 1, 0)
    sentinel = tf.gather(tf.constant(sentinels, tokens.dtype), number)
    return tf.boolean_mask(tf.where(is_first, sentinel, tokens), is_first | ~mask)


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, Any],
    sentinels: Sequence[int],
) -> tf.data.Dataset:
    """Seqio preprocessor that turns chunks into inputs and targets without EOS.

    Args:
      dataset: examples of 'targets', int32 chunks of `checked_lengths(...).tokens` tokens, and 'seed', int64 [2].
      sequence_length: TASK_FEATURE_LENGTHS.
      output_features: features of the task.
      sentinels: ids in the order of their use.

    Returns:
      Examples of 'inputs' and 'targets', each a pure function of its chunk and seed.
    """
    lengths = checked_lengths(sequence_length, sentinels)

    def corrupt(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        tokens = tf.ensure_shape(example['targets'], [lengths.tokens])
        mask = noise_mask(lengths.tokens, tf.random.experimental.stateless_split(example['seed'], 2))
        return {
            'inputs': tf.ensure_shape(spans_to_sentinels(tokens, mask, sentinels), [lengths.inputs - 1]),
            'targets': tf.ensure_shape(spans_to_sentinels(tokens, ~mask, sentinels), [lengths.targets - 1]),
        }

    return dataset.map(corrupt, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
