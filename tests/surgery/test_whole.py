"""Dense models from other models: deeper, wider, or from a model with experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.moe.quick import jit
from tests.small import image_batch, random_batch, small_t5, small_vit
from tests.surgery.in_memory import params_of, plan_for, upcycle
from tests.surgery.test_function import dense_params, model_of
from upcycle.errors import UserError
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.image_classifier import ImageClassifier
from upcycle.surgery.operators.whole import Average, Depth, Width
from upcycle.surgery.plan import Action, Surgery
from upcycle.surgery.receipt import check_function


def surgery(operator, **more):
    return Surgery(operator=None, dense_operator=operator, **more)


def loss_of(model, params, batch):
    sums = _sums(model)(params, batch)
    return float(sums['loss'] / sums['weight'])


@functools.cache
def _sums(model):
    return jit(lambda params, batch: model.forward(params, batch, None, training=False, num_microbatches=1)[0])


@pytest.mark.parametrize(('order', 'layers'), [('tile', [0, 1, 0, 1, 0]), ('interleave', [0, 0, 0, 1, 1])])
def test_a_deeper_t5_repeats_its_layers(order, layers):
    deep, batch = EncoderDecoderModel(small_t5(num_encoder_layers=5, num_decoder_layers=2)), random_batch()
    old = flatten_dict(dense_params('t5'), sep='/')
    made = flatten_dict(upcycle(deep, dense_params('t5'), surgery(Depth(order=order)), batch), sep='/')
    for i, layer in enumerate(layers):
        for name in ('mlp/wi_0/kernel', 'attention/query/kernel', 'pre_mlp_layer_norm/scale'):
            np.testing.assert_array_equal(made[f'encoder/layers_{i}/{name}'], old[f'encoder/layers_{layer}/{name}'])
    for name, leaf in made.items():
        if not name.startswith('encoder/layers_'):
            np.testing.assert_array_equal(leaf, old[name])


def test_a_deeper_vit_repeats_its_blocks_and_not_its_matrices():
    deep = ImageClassifier(small_vit(num_layers=4))
    batch = image_batch(deep.config)
    plan = plan_for(deep, dense_params('vit'), surgery('depth'), batch)
    sources = {row.target: row.sources for row in plan.rows}
    block = 'params/Transformer/encoderblock_{}/MlpBlock_0/Dense_1/bias'
    assert sources[block.format(3)] == (block.format(1),)
    assert sources[block.format(1)] == (block.format(1),)


def test_a_deeper_umt5_repeats_the_position_biases_of_its_layers():
    old, deep = (
        EncoderDecoderModel(small_t5(position_biases='every_layer', num_decoder_layers=depth)) for depth in (2, 4)
    )
    batch = random_batch()
    sources = {row.target: row.sources for row in plan_for(deep, params_of(old, batch), surgery('depth'), batch).rows}
    table = 'params/decoder/layers_{}/relpos_bias/rel_embedding'
    assert [sources[table.format(i)] for i in range(4)] == [(table.format(i % 2),) for i in range(4)]


def test_a_shallower_model_is_refused():
    shallow = EncoderDecoderModel(small_t5(num_encoder_layers=1))
    with pytest.raises(UserError, match='encoder/layers_1/.* of the checkpoint is not used by the model'):
        plan_for(shallow, dense_params('t5'), surgery('depth'), random_batch())


BIASES = {'t5': 'shared', 'umt5': 'every_layer'}


def wide(family):
    if family in BIASES:
        sizes = {'emb_dim': 256, 'mlp_dim': 768, 'num_heads': 4, 'position_biases': BIASES[family]}
        return EncoderDecoderModel(small_t5(**sizes)), random_batch(padding=3)
    config = small_vit(num_layers=2, emb_dim=256, mlp_dim=512, num_heads=8, pooling='map')
    return ImageClassifier(config), image_batch(config)


def narrow(family):
    if family in BIASES:
        return EncoderDecoderModel(small_t5(position_biases=BIASES[family]))
    return ImageClassifier(small_vit(num_layers=2, pooling='map'))


@pytest.mark.parametrize('family', ['t5', 'vit', pytest.param('umt5', marks=pytest.mark.exhaustive)])
def test_a_wider_model_has_the_same_function(family):
    model, batch = wide(family)
    old = narrow(family)
    params = params_of(old, batch)
    exact = upcycle(model, params, surgery(Width(noise=0.0)), batch)
    expected = loss_of(old, params, batch)
    assert loss_of(model, exact, batch) == pytest.approx(expected, rel=1e-5)
    noisy = upcycle(model, params, surgery(Width(noise=0.01)), batch)
    assert 1e-5 < abs(loss_of(model, noisy, batch) - expected) < 0.3
    kernel = 'encoder/layers_0/mlp/wi_0/kernel' if family in BIASES else 'head/kernel'
    difference = flatten_dict(noisy, sep='/')[kernel] - flatten_dict(exact, sep='/')[kernel]
    size = float(jnp.sqrt(jnp.mean(jnp.square(flatten_dict(exact, sep='/')[kernel]))))
    assert float(jnp.std(difference)) == pytest.approx(0.01 * size, rel=0.1)


def test_a_width_that_is_no_multiple():
    model = EncoderDecoderModel(small_t5(emb_dim=192))
    with pytest.raises(UserError, match=r"cannot be made from .* \(128, 256\) float32 by DENSE_OPERATOR = 'width'"):
        plan_for(model, dense_params('t5'), surgery('width'), random_batch())


@pytest.mark.parametrize('family', ['t5', 'vit'])
def test_the_average_of_copies_is_the_dense_model(family):
    model, batch = model_of(family, num_shared_experts=1)
    sparse = upcycle(model, dense_params(family), Surgery(), batch)
    made = upcycle(model.dense(), sparse, surgery('average'), batch)
    for name, leaf in flatten_dict(dense_params(family), sep='/').items():
        np.testing.assert_allclose(flatten_dict(made, sep='/')[name], leaf, rtol=1e-6)


def test_the_average_is_of_all_experts_and_xfts_shared_one():
    model, batch = model_of('t5', num_shared_experts=1)
    sparse = params_of(model, batch, seed=2)
    plan = plan_for(model.dense(), sparse, surgery('average'), batch)
    rows = {row.target: row for row in plan.rows}
    name = 'encoder/layers_1/mlp/wo/kernel'
    assert rows[f'params/{name}'].action is Action.REMAKE
    assert rows['params/encoder/layers_0/mlp/wo/kernel'].action is Action.KEEP
    assert set(plan.dropped.values()) == {'a dense model has no routers'}
    made = flatten_dict(upcycle(model.dense(), sparse, surgery(Average(shared_weight=0.6)), batch), sep='/')
    old = flatten_dict(sparse, sep='/')
    mean = old['encoder/layers_1/mlp/expert/wo/kernel'].mean(axis=0)
    np.testing.assert_allclose(made[name], 0.6 * old['encoder/layers_1/mlp/shared/wo/kernel'] + 0.4 * mean, atol=1e-6)


def test_the_receipt_says_what_the_average_costs():
    model, batch = model_of('t5')
    sparse = params_of(model, batch, seed=2)
    made = upcycle(model.dense(), sparse, surgery('average'), batch)
    check = check_function(model.dense(), sparse, made, batch, model)
    assert check['layers'] == {}
    whole = check['whole_model']
    assert whole['loss_gap'] == pytest.approx(
        loss_of(model.dense(), made, batch) - loss_of(model, sparse, batch), abs=2e-3
    )


def test_learned_coefficients_lead_back_to_a_dense_model():
    """XFT: a model with merged experts and its average with the learned coefficients are the same function."""
    model, batch = model_of('t5', num_shared_experts=1)
    sparse = params_of(model, batch, seed=2)
    merged = model.with_moe(router='merged', merged_shared_weight=0.6)
    plan = plan_for(merged, sparse, Surgery(operator=None), batch)
    assert set(plan.dropped.values()) == {'merged experts have no router'}
    params = upcycle(merged, sparse, Surgery(operator=None), batch)
    even = flatten_dict(upcycle(model.dense(), sparse, surgery(Average(shared_weight=0.6)), batch), sep='/')
    rng = np.random.default_rng(0)
    flat = flatten_dict(params, sep='/')
    learned = {
        name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for name, leaf in flat.items() if 'mixing' in name
    }
    assert len(learned) == 2 and not any(np.asarray(flat[name]).any() for name in learned)
    for mixing in ({}, learned):
        mixed = unflatten_dict(flat | mixing, sep='/')
        dense = upcycle(model.dense(), mixed, surgery(Average(shared_weight=0.6)), batch)
        assert loss_of(model.dense(), dense, batch) == pytest.approx(loss_of(merged, mixed, batch), rel=1e-5)
        same = all(np.allclose(leaf, even[name], atol=1e-6) for name, leaf in flatten_dict(dense, sep='/').items())
        assert same == (mixing == {})
    grads = jit(jax.grad(lambda p: merged.forward(p, batch, None, training=False, num_microbatches=1)[0]['loss']))(
        mixed
    )
    assert all(np.abs(flatten_dict(grads, sep='/')[name]).max() > 0 for name in learned)


def test_narrow_experts_are_no_mlp():
    model, batch = model_of('t5', granularity=2)
    with pytest.raises(UserError, match="cannot be made from .* by DENSE_OPERATOR = 'average'"):
        plan_for(model.dense(), params_of(model, batch), surgery('average'), batch)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: surgery('height'), "DENSE_OPERATOR = 'height' is not one of depth, width, average"),
        (lambda: Surgery(dense_operator='depth'), 'EXPERT_OPERATOR and DENSE_OPERATOR are both set'),
        (lambda: surgery('width', optimizer_state='tile'), "'width' changes them: set OPTIMIZER_STATE = 'fresh'"),
        (lambda: Depth(order='reverse'), 'DEPTH_ORDER'),
        (lambda: Width(noise=-1), 'WIDTH_NOISE'),
        (lambda: Average(shared_weight=2), 'AVERAGE_SHARED_WEIGHT'),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_depth_carries_the_state_along():
    shapes = {'params/layers_0/w': (2,), 'params/layers_1/w': (2,)}
    from upcycle.surgery.planning import plan_surgery

    def state(names):
        leaves = {name: jax.ShapeDtypeStruct((2,), jnp.float32) for name in names}
        return leaves | {
            f'opt_state/param_states/{name.removeprefix("params/")}/v': leaf for name, leaf in leaves.items()
        }

    deep = [f'params/layers_{i}/w' for i in range(4)]
    plan = plan_surgery(state(shapes), state(deep), surgery('depth', optimizer_state='tile'))
    sources = {row.target: row.sources for row in plan.rows}
    assert sources['opt_state/param_states/layers_3/w/v'] == ('opt_state/param_states/layers_1/w/v',)
