"""flaxformer's own numbers: logits, masks, weights, metrics, loss and gradients of a small upcycled T5."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.fixtures import requires_fixtures
from tests.moe.quick import jit
from tests.small import fixture, flaxformer_moe
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.moe.dispatch import masks
from upcycle.moe.layer import METRICS

pytestmark = requires_fixtures

# Name of a variant: capacity factor, and whether padding is kept out of routing. Each runs with and without padded rows, but the
# last, which is about them.
VARIANTS = {'cf1': 1.0, 'cf1.25': 1.25, 'cf2': 2.0, 'cf8': 8.0, 'cf2_ignorepad': 2.0}
CASES = [
    (padding, variant)
    for variant in VARIANTS
    for padding in ('nopad', 'pad')
    if (padding, variant) != ('nopad', 'cf2_ignorepad')
]
MOE_LAYERS = [('encoder', 1), ('encoder', 3), ('decoder', 1), ('decoder', 3)]
SCALARS = ('auxiliary_loss', 'router_z_loss', 'fraction_tokens_left_behind', 'router_confidence', 'expert_usage')


masked = jit(masks, static_argnames='num_tokens')


@functools.cache
def arrays():
    with fixture('flaxformer_moe_reference.npz') as file:
        return dict(file)


def under(prefix):
    return {name.removeprefix(prefix): array for name, array in arrays().items() if name.startswith(prefix)}


@functools.cache
def params():
    return unflatten_dict(under('params/'), sep='/')


@functools.cache
def model(variant, dispatch):
    factor = VARIANTS[variant]
    return EncoderDecoderModel(
        flaxformer_moe(
            train_capacity_factor=factor,
            eval_capacity_factor=factor,
            route_padding='down_weight' if variant == 'cf2_ignorepad' else 'route',
            dispatch=dispatch,
        )
    )


@functools.cache
def forward(variant, dispatch):
    module = model(variant, dispatch).module()
    return jit(lambda params, batch: module.apply({'params': params}, **batch, mutable=['intermediates', METRICS]))


@functools.cache
def outputs(padding, variant, dispatch):
    batch = under(f'{padding}/input/')
    batch.pop('decoder_loss_weights')
    return forward(variant, dispatch)(params(), batch)


@pytest.mark.parametrize(
    ('padding', 'variant', 'dispatch'), [*((*case, 'gather') for case in CASES), ('pad', 'cf2', 'einsum')]
)
def test_logits(padding, variant, dispatch):
    logits, _ = outputs(padding, variant, dispatch)
    np.testing.assert_allclose(logits, arrays()[f'{padding}/{variant}/logits'], atol=1e-5)


@pytest.mark.parametrize(('padding', 'variant'), CASES)
def test_every_token_sits_in_the_same_slot_with_the_same_weight(padding, variant):
    _, written = outputs(padding, variant, 'gather')
    for stack, i in MOE_LAYERS:
        (routing,) = written['intermediates'][stack][f'layers_{i}']['mlp']['routing']
        router = under(f'{padding}/{variant}/{stack}/layers_{i}/mlp/router/__call__/')
        mask_GxSxExC, combine_GxSxExC = masked(routing, num_tokens=router['dispatch_mask'].shape[1])
        np.testing.assert_array_equal(mask_GxSxExC, router['dispatch_mask'], err_msg=f'{stack} {i}')
        np.testing.assert_allclose(combine_GxSxExC, router['combine_array'], atol=1e-6, err_msg=f'{stack} {i}')


def assert_metrics(metrics, expected, layer):
    for name in SCALARS:
        np.testing.assert_allclose(metrics[name], expected[name].item(), atol=1e-6, err_msg=f'{layer} {name}')


@pytest.mark.parametrize(('padding', 'variant'), CASES)
def test_metrics(padding, variant):
    _, written = outputs(padding, variant, 'gather')
    for stack, i in MOE_LAYERS:
        metrics = written[METRICS][stack][f'layers_{i}']['mlp']
        assert_metrics(metrics, under(f'{padding}/{variant}/{stack}/layers_{i}/mlp/'), f'{stack} {i}')


@functools.cache
def layers(variant, dispatch):
    """(params, inputs, which tokens are real) -> (outputs, metrics), each by path: every MoE layer on its own."""
    moe = model(variant, dispatch)

    def apply(params, x, real):
        parts = {path: moe.moe_module(path) for path in moe.moe_layers()}
        return {
            path: module.apply({'params': params[path]}, x[path], real[path], training=False, mutable=[METRICS])
            for path, module in parts.items()
        }

    return jit(apply)


@pytest.mark.parametrize('dispatch', ['gather', 'einsum'])
@pytest.mark.parametrize(('padding', 'variant'), CASES)
def test_every_layers_output_from_flaxformers_input(padding, variant, dispatch):
    encoder, decoder = (arrays()[f'{padding}/input/{name}_input_tokens'] > 0 for name in ('encoder', 'decoder'))
    # Token 0 is the start symbol too: real when first, or followed by a real token.
    decoder = decoder | np.pad(decoder[:, 1:], ((0, 0), (0, 1))) | (np.arange(decoder.shape[1]) == 0)
    trees, x, real = {}, {}, {}
    for path in model(variant, dispatch).moe_layers():
        real[path] = encoder if path.startswith('encoder') else decoder
        trees[path] = unflatten_dict(under(f'params/{path}/'), sep='/')
        normed = arrays()[f'{padding}/{variant}/{path.removesuffix("mlp")}pre_mlp_layer_norm/__call__']
        x[path] = normed * real[path][..., None]
    for path, (y, written) in layers(variant, dispatch)(trees, x, real).items():
        expected = under(f'{padding}/{variant}/{path}/')
        np.testing.assert_allclose(y, expected['__call__'], atol=1e-5, err_msg=path)
        assert_metrics(written[METRICS], expected, path)


def test_loss_and_every_gradient():
    cf2 = model('cf2', 'gather')

    @jit
    def value_and_grad(params, batch):
        def loss(params):
            sums, moe_loss, _ = cf2.forward(params, batch, None, training=True)
            return sums['loss'] / cf2.loss_normalizer(batch) + moe_loss

        return jax.value_and_grad(loss)(params)

    for padding in ('nopad', 'pad'):
        loss, grads = value_and_grad(params(), under(f'{padding}/input/'))
        np.testing.assert_allclose(loss, arrays()[f'{padding}/cf2/loss'], rtol=1e-6)
        expected = under(f'{padding}/cf2/grad/')
        grads = flatten_dict(grads, sep='/')
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            # The decoder's own attention is saturated here: its gradients are 1e-4 of the others', a difference of large terms.
            cancels = name.endswith(('self_attention/query/kernel', 'self_attention/key/kernel'))
            tolerance = (1e-4 if cancels else 1e-5) * np.abs(expected[name]).max()
            np.testing.assert_allclose(grad, expected[name], atol=tolerance, rtol=0, err_msg=f'{padding} {name}')
