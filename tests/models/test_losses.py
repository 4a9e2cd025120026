"""Cross entropy: its own backward pass against the definition's derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit
from upcycle.models.losses import cross_entropy


def by_definition(logits, targets, z_loss, label_smoothing):
    """T5X's, with nothing but one-hot targets and a log-softmax."""
    size = logits.shape[-1]
    confidence, low = 1.0 - label_smoothing, label_smoothing / (size - 1)
    wanted = jnp.where(jax.nn.one_hot(targets, size) > 0, confidence, low)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    loss = -(wanted * jax.nn.log_softmax(logits)).sum(axis=-1)
    if label_smoothing:
        loss += confidence * np.log(confidence) + (size - 1) * low * np.log(low)
    return loss + z_loss * log_z**2, z_loss * log_z**2


@pytest.mark.parametrize('z_loss', [0.0, 0.1])
@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
def test_loss_and_gradient_are_the_definitions(z_loss, label_smoothing):
    logits = 3.0 * jax.random.normal(jax.random.key(0), (4, 6, 130))
    targets = jax.random.randint(jax.random.key(1), (4, 6), 0, 130)
    weights = jax.random.uniform(jax.random.key(2), (2, 4, 6))

    def total(function, **options):
        def of(logits):
            return sum((w * x).sum() for w, x in zip(weights, function(logits, targets, **options), strict=True))

        return jit(jax.value_and_grad(of))(logits)

    options = {'z_loss': z_loss, 'label_smoothing': label_smoothing}
    (ours, ours_grad), (theirs, theirs_grad) = total(cross_entropy, **options), total(by_definition, **options)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(ours_grad, theirs_grad, rtol=1e-5, atol=1e-6)


def test_the_backward_pass_keeps_nothing_of_the_logits_size_but_them():
    logits, targets = jnp.zeros((4, 6, 130), jnp.bfloat16), jnp.zeros((4, 6), jnp.int32)
    _, pull = jax.vjp(lambda x: cross_entropy(x, targets)[0], logits)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= logits.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
