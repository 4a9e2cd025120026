"""Log-likelihoods of continuations and of whole texts, and generation until a string, against teacher-forced logits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit, random_params
from tests.small import llm_moe, small_llm
from upcycle import partitioning
from upcycle.errors import UserError
from upcycle.evaluate import scoring
from upcycle.evaluate.scoring import Scorer, rolling_windows
from upcycle.models.causal_lm import CausalLM
from upcycle.models.generation import Sampling

MODELS = {
    'dense': CausalLM(small_llm(num_layers=1)),
    # A window shorter than the texts, and experts without room for all tokens.
    'sparse': CausalLM(small_llm(num_layers=1, window=5, moe=llm_moe(dispatch='gather', eval_capacity_factor=0.5))),
}
LONGEST = 16
# Of contexts and continuations: of two static lengths, and of one.
LENGTHS = {'dense': ((3, 2), (1, 1), (14, 2), (25, 4), (1, 16), (5, 3), (9, 1)), 'sparse': ((9, 2), (25, 4), (1, 16))}


@functools.cache
def params_of(name):
    params = random_params(MODELS[name].module(), jnp.ones((2, 8), jnp.int32))
    return jax.tree.map(lambda leaf: 2 * leaf, params)


@functools.cache
def teacher(name):
    """Log-probabilities (L, V) after each of the tokens, of one text at a time, with room for all tokens."""
    logits = jit(MODELS[name].with_moe(eval_capacity_factor=8.0).logits)

    def log_probs(tokens):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(jax.nn.log_softmax(logits(params_of(name), {'tokens': padded})[0]), np.float64)[: len(tokens)]

    return log_probs


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(scoring, 'SHORTEST', 8)


def scorer(name='dense', rows=2, longest=LONGEST):
    mesh = partitioning.make_mesh((1, 1, 1), None, jax.local_devices()[:1])
    return Scorer(MODELS[name], params_of(name), partitioning.batch_sharding(mesh), rows, longest)


def expected(name, context, continuation, longest=LONGEST):
    text = [*context, *continuation][-longest - 1 :]
    log_p = teacher(name)(text[:-1])[-len(continuation) :]
    greedy = (log_p.argmax(axis=-1) == continuation).all()
    return log_p[np.arange(len(continuation)), continuation].sum(), greedy


@pytest.mark.parametrize('name', MODELS)
def test_continuations_in_batches_of_static_lengths(name):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 128, context).tolist(), rng.integers(0, 128, continuation).tolist())
        for context, continuation in LENGTHS[name]
    ]
    context = pairs[0][0][:9]
    best = int(teacher(name)(context)[-1].argmax())
    pairs.append((context, [best, int(teacher(name)([*context, best])[-1].argmax())]))
    for pair, (total, greedy) in zip(pairs, scorer(name).log_likelihoods(pairs), strict=True):
        wanted = expected(name, *pair)
        assert total == pytest.approx(wanted[0], rel=1e-5, abs=1e-5) and greedy == wanted[1]
    assert greedy and scorer(name).log_likelihoods([]) == []


def test_windows_predict_every_token_once_with_the_most_context():
    assert rolling_windows(range(10), -1, 4) == [
        ([-1], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    for count, longest in itertools.product((0, 1, 7, 8, 9), (1, 3, 8)):
        windows = rolling_windows(range(count), -1, longest)
        assert [token for _, continuation in windows for token in continuation] == [*range(count)]
        for context, continuation in windows:
            assert [*context, *continuation] == [
                *range(continuation[-1] + 1 - len(context) - len(continuation), count)
            ][: len(context) + len(continuation)]
            assert len(context) + len(continuation) == min(longest, continuation[-1] + 1) + 1


def test_whole_texts():
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 128, length).tolist() for length in (5, 0, 37)]
    short, empty, long = scorer().rolling(texts, 7)
    assert short == pytest.approx(expected('dense', [7], texts[0])[0], rel=1e-5) and empty == 0
    windows = rolling_windows(texts[2], 7, LONGEST)
    assert len(windows) == 3
    assert long == pytest.approx(sum(expected('dense', *pair)[0] for pair in windows), rel=1e-5)


def decode(ids, *, special):
    """Ids as letters; id 3 is the special token <x>."""
    return ''.join(('<x>' if special else '') if i == 3 else chr(200 + i) for i in ids)


def greedy(name, prompt, count):
    text = list(prompt)
    for _ in range(count):
        text.append(int(teacher(name)(text)[-1].argmax()))
    return text[len(prompt) :]


def test_texts_until_a_string_an_end_or_the_most_tokens():
    rng = np.random.default_rng(2)
    prompts = [rng.integers(4, 128, length).tolist() for length in (9, 9, 30, 10)]
    tokens = [greedy('dense', prompt[-10:], 6) for prompt in prompts]
    assert all(3 not in row for row in tokens)
    whole = [decode(row, special=False) for row in tokens]
    # Two letters in the middle of the first text, and a token of the second ends it.
    stop, end = whole[0][2:4], tokens[1][2]
    sampling = Sampling(eos_ids=(end,))
    generate = functools.partial(scorer().generate_until, sampling=sampling, max_new_tokens=6, decode=decode)
    found = generate(prompts, ['never', stop, ''])
    for text, row, full in zip(found, tokens, whole, strict=True):
        until = decode(row[: row.index(end)] if end in row else row, special=False)
        assert text == until.split(stop)[0] and len(full) == 6
    assert found[0] == whole[0][:2] and len(found[1]) == tokens[1].index(end) < 3
    # A stop string in a special token ends a text, which does not contain the token.
    assert end not in tokens[2] and generate(prompts[2:3], []) == whole[2:3]
    third = tokens[2][2]

    def special(ids, *, special):
        return decode([3 if i == third else i for i in ids], special=special)

    (text,) = generate(prompts[2:3], ['<x'], decode=special)
    assert text == whole[2][: tokens[2].index(third)]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match='a continuation has 17 tokens, more than the 16'):
        scorer().log_likelihoods([([1], [2] * 17)])
    with pytest.raises(UserError, match='16 new tokens leave no room for a prompt in the 16'):
        scorer().generate_until([[1]], [], Sampling(), 16, decode)
