"""`model.generate` of the families: the cache against the whole text, prompts of different lengths, draws, ends, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit, random_params
from tests.small import llm_moe, small_llm, small_t5, small_vit
from upcycle.errors import UserError
from upcycle.models import generation
from upcycle.models.causal_lm import CausalLM
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.generation import Sampling
from upcycle.models.image_classifier import ImageClassifier

MODELS = {
    'dense': CausalLM(small_llm()),
    # A window shorter than the prompts, and experts without room for all tokens in training and evaluation.
    'sparse': CausalLM(small_llm(window=5, moe=llm_moe(dispatch='gather', eval_capacity_factor=0.5))),
    'dropless': CausalLM(small_llm(moe=llm_moe())),
}
LENGTHS = (7, 1, 4)
NEW = 5


@functools.cache
def params_of(name):
    params = random_params(MODELS[name].module(), jnp.ones((2, 8), jnp.int32))
    return jax.tree.map(lambda leaf: 2 * leaf, params)  # text that does not repeat one token


@functools.cache
def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(0, 128, length).tolist() for length in LENGTHS]


def batch(side='left'):
    tokens, mask = np.full((3, 7), 99), np.zeros((3, 7), bool)
    for row, prompt in enumerate(prompts()):
        where = slice(7 - len(prompt), 7) if side == 'left' else slice(len(prompt))
        tokens[row, where], mask[row, where] = prompt, True
    return tokens, mask


def dropless(model):
    """The model whose experts always have room."""
    moe = model.config.moe and dataclasses.replace(model.config.moe, eval_capacity_factor=8.0)
    return CausalLM(dataclasses.replace(model.config, moe=moe))


@functools.cache
def teacher(name):
    return jit(dropless(MODELS[name]).logits)


def greedy(name, prompt):
    """The most probable continuation, found by reading the whole text for each token; and its log-probability."""
    text, score = list(prompt), 0.0
    for _ in range(NEW):
        tokens = np.full((1, 12), 0)
        tokens[0, : len(text)] = text
        logits = teacher(name)(params_of(name), {'tokens': tokens})[0, len(text) - 1]
        text.append(int(logits.argmax()))
        score += float(jax.nn.log_softmax(logits)[text[-1]])
    return text[len(prompt) :], score


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('name', MODELS)
def test_equals_teacher_forcing_whatever_the_padding(name, side):
    tokens, mask = batch(side)
    made = MODELS[name].generate(params_of(name), tokens, mask, max_new_tokens=NEW)
    expected = [greedy(name, prompt) for prompt in prompts()]
    np.testing.assert_array_equal(made.tokens, [text for text, _ in expected])
    np.testing.assert_allclose(made.scores, [score for _, score in expected], atol=2e-5)
    np.testing.assert_array_equal(made.lengths, [NEW] * 3)
    assert len(np.unique(np.asarray(made.tokens))) > 5


def test_a_prompt_of_one_token_needs_no_others():
    tokens = np.array([prompts()[1]])
    made = MODELS['dense'].generate(params_of('dense'), tokens, max_new_tokens=NEW)
    np.testing.assert_array_equal(made.tokens[0], greedy('dense', prompts()[1])[0])


def test_a_stream_gives_the_same_and_ends_early():
    temperature = 1.5
    model, params, (tokens, mask) = MODELS['dense'], params_of('dense'), batch()
    free = model.generate(params, tokens, mask, max_new_tokens=NEW, temperature=temperature, key=7)
    # Every row ends at one of these, at the latest with its fourth token.
    eos_ids = tuple(np.asarray(free.tokens)[[0, 1, 2], [1, 3, 2]].tolist())
    sampling = Sampling(temperature, eos_ids=eos_ids)
    options = {'max_new_tokens': NEW, 'temperature': temperature, 'key': 7}
    made = model.generate(params, tokens, mask, **options, eos_ids=eos_ids)
    steps = list(generation.stream(model, params, tokens, mask, sampling, NEW, 7))
    assert len(steps) == max(made.lengths) < NEW
    for row in range(3):
        length = int(made.lengths[row])
        streamed = [int(token_B[row]) for token_B, real_B in steps if real_B[row]]
        assert streamed == np.asarray(free.tokens)[row, :length].tolist() and streamed[-1] in eos_ids
        np.testing.assert_array_equal(made.tokens[row], streamed + [0] * (NEW - length))


def test_draws_depend_on_the_seed_and_not_on_other_rows():
    draw = functools.partial(MODELS['dense'].generate, params_of('dense'), max_new_tokens=NEW, temperature=1.0)
    tokens, mask = batch()
    first, again, other = (np.asarray(draw(tokens, mask, key=key).tokens) for key in (0, jax.random.key(0), 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).all()
    np.testing.assert_array_equal(draw(tokens[:1], mask[:1]).tokens, first[:1])


def test_is_traceable():
    made = jax.eval_shape(
        functools.partial(MODELS['dropless'].generate, max_new_tokens=NEW),
        params_of('dropless'),
        *map(jnp.asarray, batch()),
    )
    assert made.tokens.shape == (3, NEW) and made.lengths.shape == made.scores.shape == (3,)


def test_reads_prompts_in_the_encoder():
    model = EncoderDecoderModel(small_t5(emb_dim=32, mlp_dim=64, num_encoder_layers=1, num_decoder_layers=1))
    ones = jnp.ones((2, 8), jnp.int32)
    params = random_params(model.module(), ones, ones, ones)
    tokens, mask = batch()
    made = np.asarray(model.generate(params, tokens + 1, mask, max_new_tokens=4).tokens)
    fed = np.pad(made, ((0, 0), (1, 0)))[:, :-1]
    inputs = {'encoder_input_tokens': np.where(mask, tokens + 1, 0), 'decoder_input_tokens': fed}
    np.testing.assert_array_equal(jit(model.logits)(params, inputs).argmax(axis=-1), made)


def test_refusals():
    model, params = MODELS['dense'], params_of('dense')
    refused = {
        'tokens has type float32': ([[0.5]], None, {}),
        'mask has shape': ([[1, 2]], [[1]], {}),
        'row 1 of the prompts has no token': ([[1], [2]], [[1], [0]], {}),
        'max_new_tokens = 0': ([[1]], None, {'max_new_tokens': 0}),
        'temperature = -1': ([[1]], None, {'temperature': -1}),
        'temperature = nan': ([[1]], None, {'temperature': float('nan')}),
        'top_k = -1': ([[1]], None, {'top_k': -1}),
        'top_p = 0': ([[1]], None, {'top_p': 0}),
    }
    for message, (tokens, mask, options) in refused.items():
        with pytest.raises(UserError, match=message):
            model.generate(params, tokens, mask, **{'max_new_tokens': 1, **options})
    with pytest.raises(UserError, match='a ViT generates no text'):
        ImageClassifier(small_vit()).generate({}, [[1]], max_new_tokens=1)
