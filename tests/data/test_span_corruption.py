"""Span corruption loses no tokens, has the stated lengths, and equals T5's."""

import numpy as np
import pytest

from upcycle.data import span_corruption, tensorflow_quiet
from upcycle.errors import UserError

tf = tensorflow_quiet.tensorflow()
seqio = tensorflow_quiet.seqio()

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)
SENTINELS = range(358, 258, -1)
LENGTHS = [2, 3, 7, 20, 126, 141, 568, 1137]


def corrupt(tokens, seeds):
    mask = span_corruption.noise_mask(len(tokens), seeds)
    inputs = span_corruption.spans_to_sentinels(tf.constant(tokens), mask, SENTINELS)
    targets = span_corruption.spans_to_sentinels(tf.constant(tokens), ~mask, SENTINELS)
    return mask.numpy(), inputs.numpy(), targets.numpy()


def random_tokens(length):
    return np.random.default_rng(length).integers(3, 259, length, dtype=np.int32)


def spans_by_sentinel(sequence):
    spans, sentinel = {}, None
    for token in sequence.tolist():
        if token >= 259:
            sentinel = token
            spans[sentinel] = []
        else:
            spans[sentinel].append(token)
    return spans


@pytest.mark.parametrize('length', LENGTHS)
def test_filling_the_sentinels_gives_the_original_back(length):
    tokens = random_tokens(length)
    for seed in range(5):
        _, inputs, targets = corrupt(tokens, [[seed, 1], [seed, 2]])
        spans = spans_by_sentinel(targets)
        restored = [t for token in inputs.tolist() for t in (spans[token] if token >= 259 else [token])]
        np.testing.assert_array_equal(restored, tokens)
        sentinels = [token for token in inputs.tolist() if token >= 259]
        assert sentinels == [358 - i for i in range(len(sentinels))] == list(spans)


@pytest.mark.parametrize('length', LENGTHS)
def test_lengths_and_density_are_exact(length):
    lengths = span_corruption.corrupted_lengths(length)
    for seed in range(5):
        mask, inputs, targets = corrupt(random_tokens(length), [[seed, 3], [seed, 4]])
        assert mask.sum() == lengths.noise
        assert (len(inputs) + 1, len(targets) + 1) == (lengths.inputs, lengths.targets)
        assert not mask[0] and mask[-1], 'kept and noise spans alternate, beginning with a kept one'
    if length > 100:
        assert abs(lengths.noise / length - 0.15) < 0.005
        assert abs(lengths.noise / lengths.spans - 3) < 0.2


def test_masks_differ_by_seed_and_only_by_seed():
    first, second, again = (span_corruption.noise_mask(141, [[s, 1], [s, 2]]).numpy() for s in (1, 2, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(first, again)


def test_every_position_after_the_first_is_noise_equally_often():
    masks = np.stack([span_corruption.noise_mask(40, [[s, 1], [s, 2]]).numpy() for s in range(400)])
    assert masks.mean() == pytest.approx(0.15)
    # T5's masks always end in noise and never begin with it; all positions between can be noise.
    assert (masks.mean(axis=0)[1:] > 0.03).all()


def test_inputs_are_filled_exactly():
    for inputs in [*range(4, 700), 1024, 2048]:
        lengths = span_corruption.lengths_for_inputs(inputs)
        assert lengths.inputs == inputs
        assert span_corruption.corrupted_lengths(lengths.tokens + 1).inputs > inputs


def test_t5s_own_lengths():
    assert span_corruption.lengths_for_inputs(512)[:1] + span_corruption.lengths_for_inputs(512)[3:] == (568, 512, 114)


@pytest.mark.parametrize(
    ('lengths', 'message'),
    [
        ({'inputs': 512, 'targets': 113}, "which need 114 tokens for inputs of 512: set 'targets' to 114 or more"),
        ({'inputs': 4096, 'targets': 4096}, 'needs 227 sentinels and the vocabulary has 100'),
        ({'inputs': 3, 'targets': 9}, "set 'inputs' to 4 or more"),
        ({'inputs': 512}, "both 'inputs' and 'targets'"),
        (None, "both 'inputs' and 'targets'"),
    ],
)
def test_lengths_that_cannot_be(lengths, message):
    with pytest.raises(UserError, match='TASK_FEATURE_LENGTHS') as error:
        span_corruption.checked_lengths(lengths, SENTINELS)
    assert message in str(error.value)


@pytest.fixture(scope='module')
def t5_preprocessors():
    return pytest.importorskip('t5.data.preprocessors', reason='needs `pip install upcycle[t5]`')


@pytest.mark.parametrize('length', [20, 126, 141, 568, 1137])
def test_it_equals_t5(t5_preprocessors, length):
    tokens = random_tokens(length)
    for seed in range(20):
        seeds = [(seed, 7), (11, seed)]
        mask = t5_preprocessors.random_spans_noise_mask(tf.constant(length), 0.15, seeds, 3.0)
        ours = corrupt(tokens, seeds)
        np.testing.assert_array_equal(ours[0], mask)
        theirs = [
            t5_preprocessors.noise_span_to_unique_sentinel(tf.constant(tokens), mask, VOCABULARY, seeds),
            t5_preprocessors.nonnoise_span_to_unique_sentinel(tf.constant(tokens), mask, VOCABULARY, seeds),
        ]
        np.testing.assert_array_equal(ours[1], theirs[0])
        np.testing.assert_array_equal(ours[2], theirs[1])


def test_lengths_equal_t5s(t5_preprocessors):
    masked_otherwise = 0
    for inputs in range(12, 2049):
        lengths = span_corruption.lengths_for_inputs(inputs)
        tokens, targets = t5_preprocessors.random_spans_helper(inputs, 0.15, 3.0, 1, 1, verbose=False)
        if (lengths.tokens, lengths.targets) != (tokens, targets):
            # Halves: t5's lengths are rounded in float64 and its masks in float32. Ours are those of the masks.
            mask = t5_preprocessors.random_spans_noise_mask(tf.constant(lengths.tokens), 0.15, [(0, 1), (0, 2)], 3.0)
            assert int(tf.reduce_sum(tf.cast(mask, tf.int32))) == lengths.noise != round(lengths.tokens * 0.15), inputs
            masked_otherwise += 1
    assert masked_otherwise < 25
