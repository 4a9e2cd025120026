"""T5's span corruption, from explicit seeds.

Raffel et al., JMLR 2020, section 3.1.4: 15% of the tokens, in spans of 3 on average, are removed from the inputs; a
sentinel stands for each span, and the targets list the removed spans, each after its sentinel. Which ids sentinels are
depends on the vocabulary: see `data/sentinels.py`. `tests/data/test_span_corruption.py` holds it equal to the `t5`
package, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from upcycle.data import require_lengths, tensorflow_quiet
from upcycle.data.sentinels import counted_down
from upcycle.errors import UserError

tf = tensorflow_quiet.tensorflow()
seqio = tensorflow_quiet.seqio()

if TYPE_CHECKING:
    import tensorflow as tf

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0


class Lengths(NamedTuple):
    """What a chunk of `tokens` tokens becomes. Inputs and targets count their sentinels and their EOS."""

    tokens: int
    noise: int
    spans: int
    inputs: int
    targets: int


def corrupted_lengths(
    tokens: int, noise_density: float = NOISE_DENSITY, mean_span_length: float = MEAN_SPAN_LENGTH
) -> Lengths:
    """The lengths after corrupting `tokens` (two or more) tokens; there is always a span and never only noise."""
    # t5 draws its masks with float32 arithmetic; halves could round the other way in float64.
    noise = int(np.round(np.float32(tokens) * np.float32(noise_density)))
    noise = min(max(noise, 1), tokens - 1)
    spans = max(int(np.round(np.float32(noise) / np.float32(mean_span_length))), 1)
    return Lengths(tokens, noise, spans, inputs=tokens - noise + spans + 1, targets=noise + spans + 1)


def lengths_for_inputs(
    inputs: int, noise_density: float = NOISE_DENSITY, mean_span_length: float = MEAN_SPAN_LENGTH
) -> Lengths:
    """The longest chunk whose corrupted inputs fill `inputs` positions exactly."""
    # One token more makes the inputs one longer or leaves them as they are, so the first too long ends the search.
    tokens = max(inputs - 1, 2)
    while corrupted_lengths(tokens + 1, noise_density, mean_span_length).inputs <= inputs:
        tokens += 1
    return corrupted_lengths(tokens, noise_density, mean_span_length)


def checked_lengths(sequence_length: Mapping[str, int], sentinels: Sequence[int]) -> Lengths:
    """`lengths_for_inputs`, where the targets and the sentinels suffice.

    Args:
        sequence_length: TASK_FEATURE_LENGTHS, with 'inputs' and 'targets' in tokens.
        sentinels: the ids there are.

    Raises:
        UserError: if the targets would be cut, or there are fewer sentinels than spans.
    """
    require_lengths(sequence_length or {})
    binding = f'TASK_FEATURE_LENGTHS = {dict(sequence_length)!r}'
    inputs, targets = sequence_length['inputs'], sequence_length['targets']
    if inputs < 4:
        raise UserError(f"{binding} leaves no room for a token, a sentinel and EOS: bind 'inputs' to 4 or more.")
    lengths = lengths_for_inputs(inputs)
    if targets < lengths.targets:
        raise UserError(
            f'{binding} would cut the targets of span corruption, which need {lengths.targets} tokens for inputs of '
            f"{inputs}: bind 'targets' to {lengths.targets} or more, or shorten 'inputs'."
        )
    if lengths.spans > len(sentinels):
        raise UserError(
            f'{binding} needs {lengths.spans} sentinels and the vocabulary has {len(sentinels)}: '
            "shorten 'inputs', or bind SENTINELS."
        )
    return lengths


def _random_partition(total: int, parts: int, seed: tf.Tensor) -> tf.Tensor:
    """`parts` positive int32 lengths that add up to `total`, uniform over all ways to cut a line there."""
    is_cut = seqio.stateless_shuffle(tf.cast(tf.range(total - 1) < parts - 1, tf.int32), seed)
    cuts = tf.cast(tf.where(is_cut > 0)[:, 0], tf.int32) + 1
    edges = tf.concat([[0], cuts, [total]], axis=0)
    return edges[1:] - edges[:-1]


def noise_mask(
    length: int,
    seeds: Any,
    noise_density: float = NOISE_DENSITY,
    mean_span_length: float = MEAN_SPAN_LENGTH,
) -> tf.Tensor:
    """Which of `length` tokens are noise: kept and noise spans take turns, and a kept one comes first.

    Args:
        length: tokens, two or more.
        seeds: two stateless seeds [2, 2], for the lengths of the noise spans and of the kept ones.
        noise_density: the fraction of noise.
        mean_span_length: the mean length of a noise span, in tokens.

    Returns:
        bool [length].
    """
    _, noise, spans, _, _ = corrupted_lengths(length, noise_density, mean_span_length)
    noise_lengths = _random_partition(noise, spans, seeds[0])
    kept_lengths = _random_partition(length - noise, spans, seeds[1])
    turns = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [2 * spans])
    return tf.ensure_shape(tf.repeat(tf.range(2 * spans) % 2 == 1, turns), [length])


def spans_to_sentinels(tokens: tf.Tensor, mask: tf.Tensor, sentinels: Sequence[int]) -> tf.Tensor:
    """`tokens` with every run of True in `mask` replaced by the next sentinel."""
    is_first = mask & ~tf.pad(mask[:-1], [[1, 0]])
    number = tf.maximum(tf.cumsum(tf.cast(is_first, tf.int32)) - 1, 0)
    sentinel = tf.gather(tf.constant(sentinels, tokens.dtype), number)
    return tf.boolean_mask(tf.where(is_first, sentinel, tokens), is_first | ~mask)


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, Any],
    sentinels: Sequence[int] | None = None,
) -> tf.data.Dataset:
    """The seqio preprocessor: chunks to inputs and targets, without EOS.

    Args:
        dataset: examples of 'targets', int32 chunks of `checked_lengths(...).tokens` tokens, and 'seed', int64 [2].
        sequence_length: TASK_FEATURE_LENGTHS.
        output_features: of the task; the vocabulary is that of 'targets'.
        sentinels: ids in the order of their use; None: T5's, see `counted_down`.

    Returns:
        Examples of 'inputs' and 'targets', each a pure function of its chunk and seed.
    """
    ids = counted_down(output_features['targets'].vocabulary) if sentinels is None else sentinels
    lengths = checked_lengths(sequence_length, ids)

    def corrupt(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        tokens = tf.ensure_shape(example['targets'], [lengths.tokens])
        mask = noise_mask(lengths.tokens, tf.random.experimental.stateless_split(example['seed'], 2))
        return {
            'inputs': tf.ensure_shape(spans_to_sentinels(tokens, mask, ids), [lengths.inputs - 1]),
            'targets': tf.ensure_shape(spans_to_sentinels(tokens, ~mask, ids), [lengths.targets - 1]),
        }

    return dataset.map(corrupt, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
