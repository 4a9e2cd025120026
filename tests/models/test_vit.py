"""V-MoE's numbers (logits, weights, layer outputs and gradients of a small upcycled ViT), and further behaviour of a ViT."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.fixtures import requires_fixtures
from tests.moe.quick import jit, random_params
from tests.small import close_to_largest, fixture, image_batch, small_vit, vit_moe
from upcycle.errors import UserError
from upcycle.models.image_classifier import ImageClassifier
from upcycle.models.layer_norm import LayerNorm
from upcycle.models.patches import sincos2d, to_patches
from upcycle.models.vit import Attention, Pooling, ViTConfig
from upcycle.moe.config import MoEConfig
from upcycle.moe.dispatch import masks
from upcycle.moe.layer import METRICS
from upcycle.moe.losses import importance_load_loss

FIXTURE = ViTConfig(
    num_classes=10, image_size=64, patch_size=8, emb_dim=64, num_heads=4, mlp_dim=128, num_layers=4, dtype='float32'
)
VARIANTS = {
    'items_cf2_g64': (2.0, 1, {}),
    'items_cf1_g64': (1.0, 1, {}),
    'items_cf2_g512': (2.0, 8, {}),
    'items_cf8_g64': (8.0, 1, {}),
    'experts_top2_cf2_g64': (2.0, 1, {'router': 'top_k', 'fill_order': 'choice_major'}),
    'experts_top2_bpr_cf1_g64': (1.0, 1, {'router': 'top_k', 'fill_order': 'priority'}),
    'experts_top1_cf1_g64': (1.0, 1, {'router': 'top_k', 'fill_order': 'choice_major', 'num_selected_experts': 1}),
}
NAMES = {
    'Encoder/posembed_input/pos_embedding': 'pos_embedding',
    'Encoder/': 'Transformer/',
    'SelfAttention/': 'MultiHeadDotProductAttention_0/',
    'Moe/Mlp/': 'MlpBlock_0/expert/',
    'Moe/Router/dense/': 'MlpBlock_0/router/router_weights/w/',
    'Mlp/': 'MlpBlock_0/',
}


masked = jit(masks, static_argnames='num_tokens')


@functools.cache
def arrays():
    with fixture('vmoe_reference.npz') as file:
        return dict(file)


def ours(name):
    for theirs, mine in NAMES.items():
        name = name.replace(theirs, mine)
    return name


def tree(prefix):
    flat = {ours(name.removeprefix(prefix)): array for name, array in arrays().items() if name.startswith(prefix)}
    return unflatten_dict(flat, sep='/')


def model(variant, **settings):
    factor, images, more = VARIANTS[variant]
    moe = MoEConfig(
        num_experts=8,
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
        capacity_rule='vmoe',
        balance_loss='importance_load',
        **more | settings,
    )
    return ImageClassifier(dataclasses.replace(FIXTURE, moe=moe, moe_layers=(1, 3), group_images=images))


@functools.cache
def outputs(variant, dispatch):
    module = model(variant, dispatch=dispatch).module()
    apply = jit(lambda params, image: module.apply({'params': params}, image, mutable=['intermediates', METRICS]))
    return apply(tree('moe/params/'), arrays()['images'])


@requires_fixtures
def test_dense_logits():
    module = ImageClassifier(FIXTURE).module()
    logits = jit(lambda params, image: module.apply({'params': params}, image))(
        tree('dense/params/'), arrays()['images']
    )
    np.testing.assert_allclose(logits, arrays()['dense/logits'], atol=1e-5)


@requires_fixtures
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('dispatch', ['gather', 'einsum'])
def test_logits_slots_and_layer_outputs_of_every_router(variant, dispatch):
    logits, written = outputs(variant, dispatch)
    np.testing.assert_allclose(logits, arrays()[f'{variant}/logits'], atol=1e-4)
    for i in (1, 3):
        (routing,) = written['intermediates']['Transformer'][f'encoderblock_{i}']['MlpBlock_0']['routing']
        expected = arrays()[f'{variant}/Encoder/encoderblock_{i}/Moe/Router/__call__/combine_weights']
        _, combine_GxSxExC = masked(routing, num_tokens=expected.shape[1])
        # V-MoE's slots of one expert may be in another order: what a token gets from an expert is what counts.
        np.testing.assert_allclose(np.asarray(combine_GxSxExC).sum(-1), expected.sum(-1), atol=1e-5)


@requires_fixtures
@pytest.mark.parametrize(
    ('variant', 'block', 'loss'),
    [
        ('experts_top2_cf2_g64', 1, 0.20846804976463318),
        ('experts_top2_cf2_g64', 3, 0.31319013237953186),
        ('experts_top2_bpr_cf1_g64', 3, 0.2961817979812622),
    ],
)
def test_importance_loss(variant, block, loss):
    _, written = outputs(variant, 'gather')
    metrics = written[METRICS]['Transformer'][f'encoderblock_{block}']['MlpBlock_0']
    np.testing.assert_allclose(metrics['auxiliary_loss'], loss, rtol=1e-5)


@requires_fixtures
def test_every_gradient():
    module = model('items_cf2_g64').module()

    @jit
    def gradient(params, image, cotangent):
        return jax.grad(lambda params: (module.apply({'params': params}, image) * cotangent).sum())(params)

    grads = flatten_dict(gradient(tree('moe/params/'), arrays()['images'], arrays()['grad_cotangent']), sep='/')
    expected = flatten_dict(tree('items_cf2_g64/grad/'), sep='/')
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        # A key's bias moves all logits of a query alike: its gradient is rounding.
        if not name.endswith('key/bias'):
            assert np.abs(np.asarray(grad) - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max(), name


def apply(config, batch, params=None, **arguments):
    module = ImageClassifier(config).module()
    if params is None:
        params = random_params(module, batch['image'])
    run = jit(lambda params, batch: module.apply({'params': params}, batch['image'], batch['weights'] > 0, **arguments))
    return params, run(params, batch)


def test_attention_is_flax_s():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
    theirs = nn.MultiHeadDotProductAttention(num_heads=4)
    params = random_params(theirs, x)
    expected = jit(theirs.apply)({'params': params}, x)
    np.testing.assert_allclose(jit(Attention(4, jnp.float32).apply)({'params': params}, x, x), expected, atol=1e-5)


def test_patches_are_a_convolution_of_their_size():
    config = small_vit()
    x = image_batch(config)['image']
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, 3, 8)), jnp.float32)
    expected = jax.lax.conv_general_dilated(x, kernel, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    actual = to_patches(x, 4) @ kernel.reshape(-1, 8)
    np.testing.assert_allclose(actual, expected.reshape(4, 16, 8), atol=1e-4)


@pytest.mark.parametrize('pooling', list(Pooling))
def test_names_are_big_vision_s(pooling):
    config = small_vit(pooling=pooling, representation_size=64, num_layers=1)
    params = random_params(ImageClassifier(config).module(), image_batch(config)['image'])
    names = {'embedding', 'pos_embedding', 'Transformer', 'pre_logits', 'head'}
    extra = {'token': {'cls'}, 'gap': set(), 'map': {'MAPHead_0'}}[pooling]
    assert params.keys() == names | extra
    block = flatten_dict(params['Transformer']['encoderblock_0'], sep='/')
    attention = {f'MultiHeadDotProductAttention_0/{part}' for part in ('query', 'key', 'value', 'out')}
    kernels = attention | {'MlpBlock_0/Dense_0', 'MlpBlock_0/Dense_1'}
    expected = {f'{kernel}/{leaf}' for kernel in kernels for leaf in ('kernel', 'bias')}
    assert block.keys() == expected | {f'LayerNorm_{i}/{leaf}' for i in (0, 1) for leaf in ('scale', 'bias')}
    assert block['MultiHeadDotProductAttention_0/out/kernel'].shape == (4, 32, 128)
    if pooling is Pooling.MAP:
        head = params['MAPHead_0']
        assert head.keys() == {'probe', 'MultiHeadDotProductAttention_0', 'LayerNorm_0', 'MlpBlock_0'}


@pytest.mark.parametrize('pooling', list(Pooling))
def test_the_head_reads_the_features(pooling):
    config = small_vit(pooling=pooling, representation_size=64, num_layers=1)
    batch = image_batch(config)
    params, logits = apply(config, batch)
    _, features = apply(config, batch, params, features_only=True)
    features, head = np.asarray(features), jax.tree.map(np.asarray, params['head'])
    assert features.shape == (4, 64) and (np.abs(features) <= 1).all()
    np.testing.assert_allclose(features @ head['kernel'] + head['bias'], logits, atol=1e-4)


def test_sincos_positions():
    """A quarter each of sin(x), cos(x), sin(y), cos(y); the first frequency is 1, the last 1e-4."""
    table = sincos2d(3, 8)
    assert table.shape == (1, 9, 8)
    x, y = 2, 1
    expected = [np.sin(x), np.sin(x * 1e-4), np.cos(x), np.cos(x * 1e-4)]
    expected += [np.sin(y), np.sin(y * 1e-4), np.cos(y), np.cos(y * 1e-4)]
    np.testing.assert_allclose(table[0, y * 3 + x], expected, rtol=1e-6)
    config = small_vit(positions='sincos2d')
    params, _ = apply(config, image_batch(config))
    assert 'pos_embedding' not in params


def test_erf_and_tanh_gelu_differ():
    config = small_vit(num_layers=1)
    batch = image_batch(config)
    params, logits = apply(config, batch)
    _, other = apply(dataclasses.replace(config, gelu='erf'), batch, params)
    assert 1e-5 < np.abs(np.subtract(logits, other)).max() < 0.1


@pytest.mark.parametrize('pooling', [pytest.param('gap', marks=pytest.mark.exhaustive), 'token'])
def test_scanned_blocks_compute_what_plain_ones_do(pooling):
    config = small_vit(moe=vit_moe(), pooling=pooling, group_images=2)
    batch = image_batch(config)
    model = ImageClassifier(config, aux_loss_factor=1.0)
    params, _ = apply(config, batch)

    def step(config):
        def loss(params):
            sums, moe_loss, _ = dataclasses.replace(model, config=config).forward(params, batch, None, training=True)
            return sums['loss'] + moe_loss

        return jit(jax.value_and_grad(loss))(params)

    loss, grads = step(config)
    other, other_grads = step(dataclasses.replace(config, scan_layers=True, remat='full'))
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    flat = flatten_dict(grads, sep='/')
    for name, grad in flatten_dict(other_grads, sep='/').items():
        assert name.endswith('key/bias') or close_to_largest(grad, flat[name]), name


def test_rows_that_fill_up_a_batch_change_nothing():
    """They take no slot from a real image and no part in any sum, though they are routed in one group with it."""
    config = small_vit(moe=vit_moe(eval_capacity_factor=1.0, route_padding='skip'), group_images=4)
    batch = image_batch(config, filled=2)
    model = ImageClassifier(config)
    params, _ = apply(config, batch)
    forward = jit(lambda batch: model.forward(params, batch, None, training=False))
    sums, _, metrics = forward(batch)
    noise = jnp.where(batch['weights'][:, None, None, None] > 0, batch['image'], 7.0 * batch['image'] + 1)
    labels = jnp.where(batch['weights'][:, None] > 0, batch['labels'], (batch['labels'] + 1) % 10)
    other_sums, _, other_metrics = forward(batch | {'image': noise, 'labels': labels})
    assert sums['weight'] == 2
    for name in sums:
        np.testing.assert_allclose(sums[name], other_sums[name], rtol=1e-6, err_msg=name)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_stochastic_depth_skips_whole_branches_of_an_image():
    config = small_vit(stochastic_depth=0.99, num_layers=2)
    assert config.layer_depths() == (0.0, 0.99)
    batch = image_batch(config, batch=64)
    params, expected = apply(config, batch)
    _, kept = apply(dataclasses.replace(config, stochastic_depth=0.0), batch, params)
    np.testing.assert_array_equal(expected, kept)  # it does nothing outside training
    module = ImageClassifier(config).module()
    run = jit(lambda key: module.apply({'params': params}, batch['image'], training=True, rngs={'dropout': key}))
    skipped = run(jax.random.key(0))
    one_block = {**params, 'Transformer': params['Transformer']}
    shallow = dataclasses.replace(config, num_layers=1, stochastic_depth=0.0)
    _, without = apply(shallow, batch, one_block)
    same = np.isclose(skipped, without, atol=1e-4).all(axis=-1)
    assert 0.9 < same.mean() <= 1.0  # 0.98 of the images skip both branches of the last block


def test_losses():
    config = small_vit(num_classes=3, num_layers=1)
    batch = image_batch(config) | {'labels': jnp.asarray([[0, -1], [1, 2], [2, -1], [-1, -1]])}
    params, logits = apply(config, batch)
    logits = np.asarray(logits, np.float64)
    target = np.asarray([[1, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    softmax = -(target / np.maximum(target.sum(-1, keepdims=True), 1) * log_p).sum()
    sigmoid = (np.logaddexp(0, logits) - target * logits).sum()
    for loss, expected in (('softmax', softmax), ('sigmoid', sigmoid)):
        forward = jit(functools.partial(ImageClassifier(config, loss=loss).forward, training=False))
        sums, _, _ = forward(params, batch, None)
        np.testing.assert_allclose(sums['loss'], expected, rtol=1e-5)
        assert sums['correct'] == sum(target[i, top] for i, top in enumerate(logits.argmax(-1)))


def test_mixup_mixes_neighbours_and_their_labels_in_training_only():
    config = small_vit(num_layers=1)
    batch = image_batch(config)
    params, _ = apply(config, batch)
    plain, mixed = (
        jit(ImageClassifier(config, mixup=mixup).forward, static_argnames='training') for mixup in (0.0, 0.4)
    )
    key = jax.random.key(3)
    losses = [forward(params, batch, key, training=True)[0]['loss'] for forward in (plain, mixed)]
    assert abs(losses[0] - losses[1]) > 1e-3
    losses = [forward(params, batch, key, training=False)[0]['loss'] for forward in (plain, mixed)]
    assert losses[0] == losses[1]
    # The loss is linear in the labels: mixing equal images mixes only labels, and the sum over the batch stays.
    same = batch | {'image': jnp.broadcast_to(batch['image'][:1], batch['image'].shape)}
    losses = [forward(params, same, key, training=True)[0]['loss'] for forward in (plain, mixed)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_load_loss_is_the_variation_of_the_expected_load():
    """With noise, an expert's load is the probability that fresh noise would win it a token, summed over tokens."""
    moe = vit_moe(router='top_k', num_experts=4, gate_noise=1.0, balance_loss='importance_load', route_padding='route')
    rng = np.random.default_rng(0)
    clean = jnp.asarray(rng.normal(size=(1, 64, 4)), jnp.float32)
    noise = jnp.asarray(rng.normal(size=(1, 64, 4)), jnp.float32) / 4
    real = jnp.ones((1, 64), bool)
    loss = jit(importance_load_loss, static_argnums=3)
    both = loss(clean, clean + noise, real, moe)
    importance = loss(clean, None, real, moe)
    threshold = np.sort(np.asarray(clean + noise)[0], axis=-1)[:, -2]
    draws = np.asarray(clean)[0][:, None] + rng.normal(size=(64, 4000, 4)) / 4
    load = (draws > threshold[:, None, None]).mean(axis=1).sum(axis=0)
    np.testing.assert_allclose(both - importance, load.var() / load.mean() ** 2, rtol=0.05)


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'image_size': 18}, 'IMAGE_SIZE = 18 is not a multiple of PATCH_SIZE = 4'),
        ({'num_heads': 3}, 'EMBED_DIM = 128 is not a multiple of NUM_HEADS = 3'),
        ({'pooling': 'max'}, "POOLING = 'max' must be one of token, gap, map"),
        ({'moe': MoEConfig(4), 'moe_layers': 'last_5'}, "MOE_LAYERS = 'last_5', but the stack has 4 layers"),
        ({'stochastic_depth': 1.0}, r'STOCHASTIC_DEPTH = 1.0 must be a number in \[0, 1\)'),
        ({'group_images': 0}, 'GROUP_IMAGES = 0 must be'),
    ],
)
def test_nonsense_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        small_vit(**settings)


def test_other_images_and_more_classes_are_refused():
    class Data:
        image_shape, num_classes = (28, 28, 1), 10

        def batch_spec(self):
            return {'image': ((1, *self.image_shape), 'float32')}

    with pytest.raises(UserError, match='images are 28 x 28 x 1, but the model has IMAGE_SIZE = 16'):
        ImageClassifier(small_vit()).check_data(Data())
    Data.image_shape, Data.num_classes = (16, 16, 3), 11
    with pytest.raises(UserError, match='NUM_CLASSES = 10 is smaller than the 11 classes'):
        ImageClassifier(small_vit()).check_data(Data())


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 2**-7)])
def test_the_layer_norm_and_its_gradient_are_those_of_flax(dtype, tolerance):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + rng.normal(size=(4, 16, 128)), dtype)
    params = {name: jnp.asarray(1 + rng.normal(size=128), jnp.float32) for name in ('scale', 'bias')}
    change = jnp.asarray(rng.normal(size=x.shape), dtype)

    def run(norm):
        @jit
        def both(params, x):
            y, pull = jax.vjp(lambda params, x: norm.apply({'params': params}, x), params, x)
            assert y.dtype == x.dtype
            return y, pull(change)

        return both(params, x)

    expected = run(nn.LayerNorm(1e-6, dtype, use_fast_variance=False))
    wide = functools.partial(jax.tree.map, lambda leaf: np.asarray(leaf).astype(np.float32))
    for ours, flax in zip(*map(jax.tree.leaves, (wide(run(LayerNorm(1e-6, dtype))), wide(expected))), strict=True):
        assert close_to_largest(ours, flax, tolerance)
