"""The chunked loss of a head against the one with all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.moe.quick import jit
from upcycle.models.decoder import head_of
from upcycle.models.head import Head, head_sums
from upcycle.models.layers import products_with_columns
from upcycle.models.t5 import head_of as t5_head_of

V, D = 130, 12


class Heads:
    """Configurations with the fields that a head reads."""

    def __init__(self, **fields):
        self.__dict__.update({'emb_dim': D, 'logits_divisor': 1.0, 'logits_soft_cap': None} | fields)


HEADS = {
    'untied': (head_of, {'tied_embeddings': False}),
    'tied, capped': (head_of, {'tied_embeddings': True, 'logits_divisor': 0.7, 'logits_soft_cap': 2.5}),
    't5': (t5_head_of, {'logits_via_embedding': False}),
    't5, tied': (t5_head_of, {'logits_via_embedding': True}),
}


def case(kind, vocabulary=V):
    """A function of (kernel, x, chunk) that returns the sums, and its first two arguments."""
    of, fields = HEADS[kind]
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        'decoder': {'logits_dense': {'kernel': jax.random.normal(keys[0], (D, vocabulary))}},
        'token_embedder': {'embedding': jax.random.normal(keys[1], (vocabulary, D))},
    }
    targets = jax.random.randint(keys[2], (3, 7), 0, vocabulary)
    weights = jax.random.uniform(keys[3], (3, 7)) * (targets > 20)
    kernel = of(Heads(**fields), params).kernel

    def sums(kernel, x, chunk, z_loss=0.1, label_smoothing=0.1):
        params = {'decoder': {'logits_dense': {'kernel': kernel}}, 'token_embedder': {'embedding': kernel}}
        head = of(Heads(**fields), params)
        return head_sums(head, x, targets, weights, chunk=chunk, z_loss=z_loss, label_smoothing=label_smoothing)

    return sums, kernel, jax.random.normal(keys[4], (3, 7, D))


def gradient_of(sums, chunk, **losses):
    def scaled(kernel, x):
        parts = sums(kernel, x, chunk, **losses)
        return 0.37 * parts['loss'], parts

    return jax.grad(scaled, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize('kind', HEADS)
@pytest.mark.parametrize(('vocabulary', 'chunk'), [(V, 65), (131, 40)])
def test_chunks_change_neither_sums_nor_gradients(kind, vocabulary, chunk):
    """In two halves, and in four parts, of which the last two overlap."""
    sums, *operands = case(kind, vocabulary)
    (whole, expected), (parts, found) = (jit(gradient_of(sums, size))(*operands)[::-1] for size in (None, chunk))
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_every_sum_has_its_derivative():
    sums, *operands = case('untied')

    def derived(chunk):
        return jit(jax.grad(lambda kernel, x: sums(kernel, x, chunk)['z_loss'], argnums=(0, 1)))(*operands)

    for ours, theirs in zip(derived(40), derived(None), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize('chunk', [None, 4])
def test_the_first_of_equal_logits_is_the_largest(chunk):
    kernel, x = jnp.zeros((1, 10)).at[0, jnp.array([3, 5, 9])].set(1.0), jnp.ones((1, 3, 1))
    head = Head(kernel, ('embed', 'vocab'), products_with_columns)
    targets = jnp.array([[3, 5, 9]])
    assert head_sums(head, x, targets, targets * 0 + 1, chunk=chunk, z_loss=0.0, label_smoothing=0.0)['correct'] == 1


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_no_array_holds_all_logits():
    sums, *operands = case('tied, capped')

    def program(chunk):
        found = list(equations(jax.make_jaxpr(gradient_of(sums, chunk))(*operands).jaxpr))
        sizes = [v.aval.size for equation in found for v in equation.outvars]
        return max(sizes), sum(equation.primitive.name == 'dot_general' for equation in found)

    assert program(None) == (21 * V, 3)
    assert program(65) == (V * D, 4)  # logits are computed in both passes


def test_the_inputs_gradient_is_rounded_once():
    """In bfloat16 it is that of the whole, although it is summed over chunks."""
    sums, kernel, x = case('untied')
    x = x.astype(jnp.bfloat16)
    (_, whole), (_, parts) = (jit(gradient_of(sums, chunk))(kernel, x)[0] for chunk in (None, 13))
    assert parts.dtype == jnp.bfloat16
    assert np.mean(np.asarray(whole == parts)) > 0.98


@pytest.mark.parametrize(
    ('vocabulary', 'tokens', 'parts'),
    [(256, 2**17, 1), (32128, 3648, 1), (32128, 29184, 8), (128256, 1024, 1), (128256, 4096, 6), (262144, 4096, 8)],
)
def test_the_number_of_parts_follows_the_size_of_the_logits(vocabulary, tokens, parts):
    kernel, x, targets = (
        jax.ShapeDtypeStruct(*of)
        for of in (((D, vocabulary), 'float32'), ((1, tokens, D), 'float32'), ((1, tokens), 'int32'))
    )

    def sums(kernel, x, targets):
        head = Head(kernel, ('embed', 'vocab'), products_with_columns)
        return head_sums(head, x, targets, targets, chunk='auto', z_loss=0.0, label_smoothing=0.0)

    loops = [e for e in equations(jax.make_jaxpr(sums)(kernel, x, targets).jaxpr) if e.primitive.name == 'scan']
    assert [loop.params['length'] for loop in loops] == [parts] * (parts > 1)
