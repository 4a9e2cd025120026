"""Generation: the cache against teacher forcing, the searches against slow obvious ones."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit, random_params
from upcycle.errors import UserError
from upcycle.models.decoding import beam_search, brevity_penalty, generate, t5_step
from upcycle.models.generation import Sampling, sample
from upcycle.models.t5 import T5Config, Transformer
from upcycle.moe.config import MoEConfig

EOS = 1
LENGTH = 6
DENSE = T5Config(
    vocab_size=32,
    emb_dim=64,
    num_heads=4,
    head_dim=16,
    mlp_dim=128,
    num_encoder_layers=1,
    num_decoder_layers=2,
    dtype='float32',
)
# Nothing drops at evaluation; the training factor and GROUPS_MULTIPLE_OF must not matter to a cache.
MOE = MoEConfig(num_experts=4, router='top_k', train_capacity_factor=0.5, eval_capacity_factor=4.0)
CONFIGS = {
    'dense': DENSE,
    'biases in every layer': dataclasses.replace(DENSE, position_biases='every_layer'),
    # T5 1.0 besides, so that its output layer is decoded too.
    'moe': dataclasses.replace(
        DENSE,
        mlp_activations=('relu',),
        logits_via_embedding=True,
        encoder_moe=MOE,
        encoder_moe_layers=(0,),
        decoder_moe=MOE,
    ),
}


@functools.cache
def model(name):
    transformer = Transformer(CONFIGS[name])
    tokens = jnp.ones((2, 8), jnp.int32)
    params = random_params(transformer, tokens, tokens, tokens)
    return transformer, params


def encoder_tokens(batch=3, length=8, padding=0):
    tokens = np.random.default_rng(5).integers(2, 32, (batch, length))
    return jnp.asarray(np.pad(tokens, ((0, 0), (0, padding))), jnp.int32)


@functools.cache
def teacher(name):
    """(encoder tokens, decoder inputs) -> log-probabilities of every next token, without a cache."""
    transformer, _ = model(name)

    @jit
    def log_probs(params, encoder_input_tokens, decoder_input_tokens):
        encoded = transformer.apply({'params': params}, encoder_input_tokens, method='encode')
        logits = transformer.apply(
            {'params': params}, encoded, encoder_input_tokens, decoder_input_tokens, method='decode'
        )
        return jax.nn.log_softmax(logits)

    return functools.partial(log_probs, model(name)[1])


def shift_right(tokens):
    return np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]


def run(name, tokens, rng=None, **options):
    transformer, params = model(name)
    return generator(transformer, **options)(params, tokens, rng=rng)


@functools.cache
def generator(transformer, **options):
    return jit(functools.partial(generate, transformer, **options))


def search(step, cache, **options):
    """`beam_search`, jitted."""
    return jit(lambda cache: beam_search(step, cache, **options))(cache)


def draw(step, cache, *, batch_size, max_length, rng=None, eos_id=EOS, **options):
    """Tokens and scores of `sample`, jitted."""
    sampling, first_B = Sampling(**options, eos_ids=(eos_id,)), jnp.zeros(batch_size, jnp.int32)
    run = jit(lambda cache: sample(step, cache, sampling, first_B=first_B, max_length=max_length, key=rng))
    tokens, _, scores = run(cache)
    return tokens, scores


class TestCache:
    @pytest.mark.parametrize('name', CONFIGS)
    def test_equals_teacher_forcing_at_every_position(self, name):
        transformer, params = model(name)
        inputs, length = encoder_tokens(), LENGTH
        targets = np.random.default_rng(1).integers(0, 32, (3, length)).astype(np.int32)
        fed = shift_right(targets)

        @jit
        def decode(params):
            step, cache = t5_step(transformer, params, inputs, max_length=length, num_decodes=1)

            def advance(cache, tokens_B):
                logits, cache = step(tokens_B[:, None], cache)
                return cache, jax.nn.log_softmax(logits)

            return jax.lax.scan(advance, cache, jnp.asarray(fed.T))[1]

        cached_LxBxV = decode(params)
        np.testing.assert_allclose(cached_LxBxV.swapaxes(0, 1), teacher(name)(inputs, fed), atol=1e-5)

    def test_is_made_whatever_the_groups_of_a_batch(self):
        """3 x 7 tokens cannot be cut into a multiple of 4 groups; one position at a time needs no groups."""
        transformer = Transformer(
            dataclasses.replace(DENSE, decoder_moe=dataclasses.replace(MOE, groups_multiple_of=4))
        )
        params = random_params(transformer, *[jnp.ones((2, 8), jnp.int32)] * 3)
        tokens, _ = jax.eval_shape(functools.partial(generate, transformer, max_length=7), params, encoder_tokens())
        assert tokens.shape == (3, 1, 7)

    def test_keys_of_the_encoder_are_not_part_of_what_a_search_reorders(self):
        transformer, params = model('dense')
        make = functools.partial(t5_step, transformer, max_length=5, num_decodes=2)
        cache = jax.eval_shape(lambda *arguments: make(*arguments)[1], params, encoder_tokens())
        assert {path[-2] for path in cache} == {'self_attention'}
        assert {leaf.shape for leaf in cache.values()} == {(), (3 * 2, 5, 4, 16)}


class TestGreedy:
    def test_equals_argmax_of_repeated_teacher_forcing(self):
        name, inputs, length = 'dense', encoder_tokens(), LENGTH
        expected = np.zeros((3, length), np.int32)
        for t in range(length):
            expected[:, t] = np.argmax(teacher(name)(inputs, shift_right(expected))[:, t], axis=-1)
        log_prob_BxL = np.take_along_axis(
            np.asarray(teacher(name)(inputs, shift_right(expected))), expected[..., None], axis=-1
        )[..., 0]
        # Free-running teacher forcing does not stop at the end; generation does.
        after_end = np.cumsum(shift_right(expected == EOS), axis=1) > 0
        tokens, scores = run(name, inputs, max_length=length, num_decodes=1)
        np.testing.assert_array_equal(tokens[:, 0], np.where(after_end, 0, expected))
        np.testing.assert_allclose(scores[:, 0], np.where(after_end, 0, log_prob_BxL).sum(axis=1), atol=1e-5)

    def test_stops_when_every_row_ended(self):
        _, step, cache = table_model(seed=0, rows=2, sequences=2, end_at=2, poison_after=4)
        tokens, scores = draw(step, cache, batch_size=2, max_length=8)
        assert (np.asarray(tokens)[:, 2] == EOS).all() and not np.asarray(tokens)[:, 3:].any()
        assert np.isfinite(scores).all()


# A model as a table: the logits follow from the row and from a hash of the tokens so far, which the cache holds.
STATES = 97


def table_model(seed, rows, sequences, vocabulary=5, end_at=None, poison_after=None, spread=2.0):
    """(log-probability of the next token by row and prefix, step, cache). From `end_at` on, the end is nearly certain;
    from `poison_after` on, logits are nan."""
    table = np.random.default_rng(seed).normal(size=(rows, STATES, vocabulary)).astype(np.float32) * spread
    table_j = jnp.asarray(table)

    def next_state(state, token, position):
        return (state * 31 + token * 7 + position + 1) % STATES

    def adjust(logits, position, where):
        if end_at is not None:
            sure = np.where(np.arange(vocabulary) == EOS, 30.0, 0.0)
            logits = logits + where(position >= end_at, sure, -2 * sure)
        if poison_after is not None:
            logits = where(position >= poison_after, np.nan, logits)
        return logits

    def step(tokens_Nx1, cache):
        state = next_state(cache['state'], tokens_Nx1[:, 0], cache['position'])
        logits = adjust(table_j[cache['row'], state], cache['position'], jnp.where)
        return logits, {'state': state, 'row': cache['row'], 'position': cache['position'] + 1}

    def log_probs(row, prefix):
        state = 0
        for position, token in enumerate((0, *prefix)):
            state = next_state(state, token, position)
        logits = adjust(table[row, state], len(prefix), np.where)
        return logits - np.logaddexp.reduce(logits)

    cache = {
        'state': jnp.zeros(sequences, jnp.int32),
        'row': jnp.repeat(jnp.arange(rows), sequences // rows),
        'position': jnp.zeros((), jnp.int32),
    }
    return log_probs, step, cache


def penalty(alpha, length):
    return ((5 + length) / 6) ** alpha


def slow_beam_search(log_probs, num_decodes, max_length, alpha):
    """T5X's rule in plain words, without early exit: [(score, tokens)], best first."""
    live, ended = [(0.0, ())], []
    for length in range(1, max_length + 1):
        grown = [(score + p, (*tokens, v)) for score, tokens in live for v, p in enumerate(log_probs(tokens))]
        best = sorted(grown, reverse=True)[: 2 * num_decodes]
        ended += [(score / penalty(alpha, length), tokens) for score, tokens in best if tokens[-1] == EOS]
        live = [(score, tokens) for score, tokens in best if tokens[-1] != EOS][:num_decodes]
    ended = sorted(ended, reverse=True)[:num_decodes]
    cut = [(score / penalty(alpha, max_length), tokens) for score, tokens in live]
    return (ended + cut)[:num_decodes]


def assert_sequences(tokens, scores, expected, atol=1e-5):
    np.testing.assert_allclose(scores, [score for score, _ in expected], atol=atol)
    length = tokens.shape[-1]
    np.testing.assert_array_equal(tokens, [sequence + (0,) * (length - len(sequence)) for _, sequence in expected])


class TestBeamSearch:
    @pytest.mark.parametrize('alpha', [0.0, 0.6])
    def test_wide_enough_equals_exhaustive_search(self, alpha):
        rows, V, L = 2, 5, 4
        N = 160  # 4^3 prefixes without an end have 2N = 5 * 4^3 continuations: none is ever lost
        log_probs, step, cache = table_model(seed=3, rows=rows, sequences=rows * N, vocabulary=V)
        tokens, scores = search(step, cache, batch_size=rows, num_decodes=N, max_length=L, alpha=alpha)
        others = [v for v in range(V) if v != EOS]
        for row in range(rows):

            def scored(sequence, row=row):
                log_prob = sum(log_probs(row, sequence[:t])[sequence[t]] for t in range(len(sequence)))
                return log_prob / penalty(alpha, len(sequence)), sequence

            ended = [scored((*p, EOS)) for n in range(L) for p in itertools.product(others, repeat=n)]
            cut = [scored(p) for p in itertools.product(others, repeat=L)]
            assert (len(ended), len(cut)) == (1 + 4 + 16 + 64, 256)
            expected = sorted(ended, reverse=True) + sorted(cut, reverse=True)
            assert_sequences(tokens[row], scores[row], expected[:N])

    @pytest.mark.parametrize(('num_decodes', 'length', 'alpha'), [(1, 7, 0.6), (2, 9, 0.6), (3, 6, 0.0), (4, 3, 1.0)])
    def test_equals_slow_search(self, num_decodes, length, alpha):
        rows = 8
        log_probs, step, cache = table_model(seed=num_decodes, rows=rows, sequences=rows * num_decodes, vocabulary=6)
        tokens, scores = search(step, cache, batch_size=rows, num_decodes=num_decodes, max_length=length, alpha=alpha)
        for row in range(rows):
            expected = slow_beam_search(functools.partial(log_probs, row), num_decodes, length, alpha)
            assert_sequences(tokens[row], scores[row], expected)

    def test_best_live_beams_follow_where_too_few_ended(self):
        """Nothing ends before position 6."""
        log_probs, step, cache = table_model(seed=1, rows=1, sequences=3, vocabulary=9, end_at=6)
        tokens, scores = search(step, cache, batch_size=1, num_decodes=3, max_length=4)
        assert EOS not in np.asarray(tokens)
        assert_sequences(tokens[0], scores[0], slow_beam_search(functools.partial(log_probs, 0), 3, 4, 0.6))

    def test_stops_when_no_beam_can_improve(self):
        """From position 4 on the model gives nan; the ends at position 2 must have stopped the search by then."""
        log_probs, step, cache = table_model(seed=2, rows=2, sequences=4, end_at=2, poison_after=4)
        tokens, scores = search(step, cache, batch_size=2, num_decodes=2, max_length=16)
        assert (np.asarray(tokens)[:, :, 2] == EOS).all() and np.isfinite(scores).all()

    @pytest.mark.parametrize('alpha', [0.0, 0.6])
    def test_of_one_beam_equals_greedy_where_the_end_is_never_in_doubt(self, alpha):
        """The end is either nearly certain or nearly impossible: see `beam_search` for what differs otherwise."""
        _, step, cache = table_model(seed=4, rows=6, sequences=6, vocabulary=7, end_at=5)
        greedy_tokens, log_probs = draw(step, cache, batch_size=6, max_length=9)
        tokens, scores = search(step, cache, batch_size=6, num_decodes=1, max_length=9, alpha=alpha)
        np.testing.assert_array_equal(tokens[:, 0], greedy_tokens)
        np.testing.assert_allclose(scores[:, 0] * penalty(alpha, 6), log_probs, rtol=1e-5)

    def test_of_one_beam_sees_an_end_that_comes_second(self):
        """T5X's rule, and the reason why `generate` does not use it for one decode."""

        def step(tokens_Nx1, cache):
            first = jnp.log(jnp.array([0.0, 0.4, 0.6, 0.0]))
            later = jnp.log(jnp.array([0.0, 0.1, 0.45, 0.45]))
            return jnp.where(cache == 0, first, later)[None], cache + 1

        start = jnp.zeros((), jnp.int32)
        tokens, scores = search(step, start, batch_size=1, num_decodes=1, max_length=3, alpha=0.0)
        np.testing.assert_array_equal(tokens[0, 0], [EOS, 0, 0])
        np.testing.assert_allclose(scores[0, 0], np.log(0.4), rtol=1e-6)
        np.testing.assert_array_equal(draw(step, start, batch_size=1, max_length=3)[0][0], [2, 2, 2])

    def test_marks_sequences_that_do_not_exist(self):
        """A model that only ever says 2, then the end, has one sequence."""

        def step(tokens_Nx1, cache):
            only = jnp.where(cache == 0, jnp.arange(4) == 2, jnp.arange(4) == EOS)
            return jnp.broadcast_to(jnp.where(only, 0.0, -jnp.inf), (3, 4)), cache + 1

        tokens, scores = search(step, jnp.zeros((), jnp.int32), batch_size=1, num_decodes=3, max_length=4, alpha=0.0)
        np.testing.assert_array_equal(tokens[0, 0], [2, EOS, 0, 0])
        np.testing.assert_array_equal(scores[0], [0.0, -np.inf, -np.inf])

    def test_of_a_model_equals_slow_search_with_teacher_forcing(self):
        """Fails when the cache is not reordered along with the beams."""
        name, inputs, length = 'moe', encoder_tokens(), LENGTH
        tokens, scores = run(name, inputs, max_length=length, num_decodes=3)

        @functools.cache
        def log_probs(row, prefix):
            fed = np.zeros((3, length), np.int32)
            fed[:, 1 : len(prefix) + 1] = prefix
            return np.asarray(teacher(name)(inputs, fed))[row, len(prefix)]

        for row in range(3):
            expected = slow_beam_search(functools.partial(log_probs, row), 3, length, 0.6)
            assert_sequences(tokens[row], scores[row], expected)
        assert len(np.unique(np.asarray(tokens)[0], axis=0)) == 3

    def test_brevity_penalty_is_t5xs(self):
        np.testing.assert_allclose([brevity_penalty(0.6, 1), brevity_penalty(0.6, 7)], [1.0, 2.0**0.6], rtol=1e-6)

    def test_refuses_a_negative_alpha(self):
        with pytest.raises(UserError, match='ALPHA = -1'):
            beam_search(None, None, batch_size=1, num_decodes=2, max_length=3, alpha=-1)


class TestSampling:
    def test_among_one_token_is_greedy(self):
        _, step, cache = table_model(seed=6, rows=4, sequences=4)
        drawn = draw(step, cache, batch_size=4, max_length=6, temperature=0.7, top_k=1, rng=jax.random.key(0))
        greedy = draw(step, cache, batch_size=4, max_length=6)
        np.testing.assert_array_equal(drawn[0], greedy[0])
        np.testing.assert_allclose(drawn[1], greedy[1], atol=1e-5)

    @pytest.mark.parametrize(
        ('temperature', 'top_k', 'top_p', 'expected'),
        [
            (1.0, 0, 1.0, [1, 2, 3, 4]),
            (0.5, 3, 1.0, [0, 4, 9, 16]),
            # 4 and 3 have 0.7 of the probability; at temperature 0.5 they have 25/30.
            (1.0, 0, 0.7, [0, 0, 3, 4]),
            (1.0, 0, 0.71, [0, 2, 3, 4]),
            (0.5, 0, 0.8, [0, 0, 9, 16]),
            # Of the two that top_k leaves, 4 alone has 4/7.
            (1.0, 2, 0.55, [0, 0, 0, 1]),
        ],
    )
    def test_draws_from_the_tempered_distribution(self, temperature, top_k, top_p, expected):
        logits = jnp.log(jnp.array([1.0, 2.0, 3.0, 4.0]))
        tokens, scores = draw(
            lambda tokens, cache: (jnp.broadcast_to(logits, (4000, 4)), cache),
            None,
            batch_size=4000,
            max_length=1,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            rng=jax.random.key(2),
            eos_id=9,
        )
        share = np.bincount(np.asarray(tokens)[:, 0], minlength=4) / 4000
        # Four standard errors of a share of 4000 draws.
        np.testing.assert_allclose(share, np.array(expected) / sum(expected), atol=4 * 0.5 / 4000**0.5)
        np.testing.assert_allclose(scores, jax.nn.log_softmax(logits)[tokens[:, 0]], rtol=1e-5)

    def test_sorts_several_decodes_by_probability(self):
        tokens, scores = run(
            'dense', encoder_tokens(), max_length=5, num_decodes=4, temperature=1.0, rng=jax.random.key(1)
        )
        assert tokens.shape == (3, 4, 5)
        assert (np.diff(scores) <= 0).all()
        assert len(np.unique(np.asarray(tokens)[0], axis=0)) > 1

    def test_needs_a_key(self):
        with pytest.raises(UserError, match='temperature = 0.5'):
            sample(None, None, Sampling(0.5), first_B=jnp.zeros(1), max_length=1)


class TestGenerate:
    @pytest.mark.parametrize(('name', 'num_decodes'), [('dense', 1), ('moe', 3)])
    def test_does_not_see_padding(self, name, num_decodes):
        options = {'max_length': LENGTH, 'num_decodes': num_decodes}
        tokens, scores = run(name, encoder_tokens(), **options)
        padded_tokens, padded_scores = run(name, encoder_tokens(padding=5), **options)
        np.testing.assert_array_equal(tokens, padded_tokens)
        np.testing.assert_allclose(scores, padded_scores, atol=1e-5)

    def test_runs_in_bfloat16(self):
        num_decodes = 2
        transformer = Transformer(dataclasses.replace(CONFIGS['moe'], dtype='bfloat16'))
        generated = generator(transformer, max_length=LENGTH, num_decodes=num_decodes)
        tokens, scores = generated(model('moe')[1], encoder_tokens())
        assert tokens.shape == (3, num_decodes, LENGTH) and tokens.dtype == jnp.int32
        assert scores.dtype == jnp.float32 and np.isfinite(scores).all() and (scores < 0).all()
