"""Attention's softmax: JAX's own values and derivatives, and one array of weights kept for the backward pass."""

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit
from upcycle.models.layers.attention import attention
from upcycle.models.memory import softmax

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32) * 4


def test_softmax_is_jaxs_and_so_are_its_derivatives():
    towards = jnp.asarray(np.random.default_rng(1).normal(size=LOGITS.shape), jnp.float32)

    def results(f):
        return jit(
            lambda x: (
                f(x),
                jax.grad(lambda x: (f(x) * towards).sum())(x),
                jax.jvp(f, (x,), (towards,))[1],
                jax.hessian(lambda x: (f(x) ** 2).sum())(x[0, 0]),
            )
        )(LOGITS)

    (ours, *ours_derived, ours_second), (theirs, *theirs_derived, theirs_second) = map(
        results, (softmax, jax.nn.softmax)
    )
    np.testing.assert_array_equal(ours, theirs)
    for our, their in zip(ours_derived, theirs_derived, strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours_second, theirs_second, rtol=1e-4, atol=1e-6)


def test_a_row_that_is_masked_as_a_whole_has_no_gradient_that_is_not_finite():
    masked = LOGITS.at[0, 0].set(-1e10)
    gradient = jax.grad(lambda x: softmax(x)[..., 0].sum())(masked)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_of_the_attention_weights_one_array_is_kept(dtype, capsys):
    query, key, value = (jnp.ones((2, length, 3, 8), dtype) for length in (16, 24, 24))
    bias = jnp.zeros((3, 16, 24), dtype)
    jax.ad_checkpoint.print_saved_residuals(
        lambda *args: attention(*args, bias=bias, float32_logits=False).sum(), query, key, value
    )
    kept = [line for line in capsys.readouterr().out.splitlines() if '[2,3,16,24]' in line]
    assert len(kept) == 1, kept
