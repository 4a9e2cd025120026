"""Derivatives of the layers, and what they keep for the backward pass."""

import jax
import jax.numpy as jnp
import pytest

from tests.moe.quick import jit, random_params
from tests.small import FEATURES, close_to_largest, image_batch, random_batch, small_t5, small_vit, vit_moe, with_moe
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.image_classifier import ImageClassifier
from upcycle.models.layers import drop
from upcycle.models.layers.attention import attention
from upcycle.models.memory import recomputed


def test_recomputed_functions_have_the_same_gradients():
    """Also of arguments without a gradient, and of none."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (8, 16)), jax.random.normal(keys[1], (16, 4))

    def function(rest, xs):
        kernel, key, rows, nothing = rest
        assert nothing is None
        kept = jax.random.bernoulli(key, 0.5, xs[0].shape) * (jnp.arange(8)[:, None] < rows)
        return jnp.tanh(xs[0] * xs[1] * kept) @ kernel

    def loss(f, kernel, xs):
        return jnp.square(f((kernel, keys[2], jnp.int32(6), None), xs)).sum()

    def gradients(f):
        return jit(jax.grad(lambda kernel, xs: loss(f, kernel, xs), argnums=(0, 1)))(w, (x, x + 1))

    again = gradients(lambda rest, xs: recomputed(function, rest, xs))
    assert all(jax.tree.leaves(jax.tree.map(close_to_largest, again, gradients(function))))
    stacked = jit(jax.vmap(jax.grad(lambda x: loss(lambda *given: recomputed(function, *given), w, (x, x)))))
    assert close_to_largest(stacked(x[None])[0], jit(jax.grad(lambda x: loss(function, w, (x, x))))(x))


def attentions(depth, keep_weights):
    """The loss of several attentions, one after the other: 8 heads of 32, 256 queries, 320 keys, dropout."""

    def loss(x_BxQxHxN, given, mask_BxQxK):
        key_BxKxHxN, value_BxKxHxN, bias_HxQxK = given
        for i in range(depth):
            x_BxQxHxN += attention(
                x_BxQxHxN,
                key_BxKxHxN,
                drop(value_BxKxHxN, jax.random.key(i), rate=0.1, broadcast_axis=-1),
                mask=mask_BxQxK,
                bias=bias_HxQxK,
                keep_weights=keep_weights,
            )
        return jnp.square(x_BxQxHxN).sum()

    return loss


def kept_bytes(function, *arguments):
    """Bytes that JAX keeps for the backward pass, arguments left out."""
    kept = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1].opaque_residuals, *arguments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def test_attention_weights_that_are_recomputed():
    """The same gradients, of all arguments, and nothing that grows with the square of the length is kept."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, key, value = (jax.random.normal(k, (2, length, 8, 32)) for k, length in zip(keys, (256, 320, 320), strict=False))
    mask = jax.random.bernoulli(keys[3], 0.8, (2, 256, 320))
    given = (key, value, jax.random.normal(keys[4], (8, 256, 320)))
    kept, again = (jit(jax.grad(attentions(3, keep_weights), (0, 1)))(x, given, mask) for keep_weights in (True, False))
    assert all(jax.tree.leaves(jax.tree.map(close_to_largest, again, kept)))

    def bytes_each(keep_weights):
        sizes = [kept_bytes(attentions(depth, keep_weights), x, given, mask) for depth in (2, 4)]
        return (sizes[1] - sizes[0]) / 2

    weights = 4 * 2 * 8 * 256 * 320
    assert bytes_each(True) >= weights
    assert bytes_each(False) < 0.5 * weights


def bytes_a_layer(model_of, batch, params_of):
    """What each layer keeps for the backward pass."""

    def kept(depth):
        model = model_of(depth)

        def loss(params):
            return model.forward(params, batch, None, training=True)[0]['loss']

        return kept_bytes(loss, jax.eval_shape(lambda: params_of(model.module())))

    return (kept(4) - kept(2)) / 2


@pytest.mark.parametrize('sparse', [False, True])
def test_of_an_mlp_of_t5_the_products_with_wi_are_kept(sparse):
    """And nothing else of that size: it could be the activations, their tanh and their product too, 2.2 times as much."""
    batch = random_batch(inputs=64)

    def model_of(depth):
        config = small_t5(mlp_dim=4096, emb_dim=32, num_encoder_layers=depth, num_decoder_layers=1)
        return EncoderDecoderModel(with_moe(config, num_experts=4) if sparse else config)

    def params_of(module):
        return random_params(module, **{name: batch[name] for name in FEATURES[:3]})

    # Every second layer has two slots a token.
    products = 2 * 4 * 64 * 4096 * 4 * (1.5 if sparse else 1.0)
    assert bytes_a_layer(model_of, batch, params_of) < 1.25 * products


@pytest.mark.parametrize('sparse', [False, True])
def test_of_an_mlp_of_a_vit_what_the_gelu_was_given_is_kept(sparse):
    fields = {'emb_dim': 32, 'num_heads': 2, 'mlp_dim': 4096, 'image_size': 32}
    batch = image_batch(small_vit(**fields))

    def model_of(depth):
        moe = {'moe': vit_moe(num_experts=4), 'moe_layers': tuple(range(depth))} if sparse else {}
        return ImageClassifier(small_vit(**fields, num_layers=depth, **moe))

    def params_of(module):
        return random_params(module, image=batch['image'])

    products = 4 * 64 * 4096 * 4 * (2.0 if sparse else 1.0)
    assert bytes_a_layer(model_of, batch, params_of) < 1.25 * products
