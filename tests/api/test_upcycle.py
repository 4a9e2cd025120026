"""Our models in memory: the same bytes as `upcycle convert`, receipts, recipes, errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import upcycle
from tests import runs
from tests.checkpoints import trees
from tests.small import random_batch
from upcycle.checkpoints import open_checkpoint
from upcycle.errors import UserError
from upcycle.in_memory import as_key, seed_of

SMALL = {'NUM_EXPERTS': 4, 'NUM_EMBEDDINGS': 384} | runs.ONE_SPARSE_LAYER


@pytest.fixture(scope='module')
def dense_model(untrained):
    return upcycle.load(untrained)


@pytest.fixture(scope='module')
def sparse_model(dense_model):
    moe = {name: value for name, value in runs.ONE_SPARSE_LAYER.items() if name.endswith('MOE_LAYERS')}
    return upcycle.sparse(dense_model[0], NUM_EXPERTS=4, **moe)


def flat(params):
    return flatten_dict({'params': params}, sep='/')


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert np.asarray(leaf).tobytes() == np.asarray(right[name]).tobytes(), name


@pytest.mark.parametrize('operator', ['copy', 'drop'])
def test_the_bytes_of_convert(operator, dense_model, sparse_model, untrained, tmp_path):
    files = (runs.TINY, 'moe/t5.gin')
    path = upcycle.convert(files, untrained, tmp_path / 'moe', EXPERT_OPERATOR=operator, UPCYCLE_SEED=3, **SMALL)
    surgery = upcycle.Surgery(operator)
    params, receipt = upcycle.upcycle(dense_model[1], sparse_model, surgery, key=jax.random.key(3))
    reader = open_checkpoint(path)
    stored = {name: reader.read(name) for name in reader.leaves() if name.startswith('params/')}
    assert_same(flat(params), stored)
    written, receipt = reader.metadata['receipt'], json.loads(json.dumps(receipt))
    assert receipt['seed'] == written['seed'] == 3
    assert receipt['plan'] == [row for row in written['plan'] if row['target'] in stored]
    assert receipt['sha256'] == {name: sha for name, sha in written['sha256'].items() if name.startswith('params/')}
    for name in ('operator', 'operator_options', 'router_init'):
        assert receipt[name] == written[name]
    for path, layer in written['function_check']['layers'].items():
        for name, value in receipt['function_check']['layers'][path].items():
            np.testing.assert_allclose(value, layer[name], rtol=1e-5, atol=1e-6)
    # From the checkpoint path, which is never fully in memory.
    from_path, receipt = upcycle.upcycle(untrained, sparse_model, surgery, key=3)
    assert_same(flat(from_path), stored)
    assert receipt['source']['step'] == 4


@pytest.mark.exhaustive  # the trainer's and the page's whole-model checks are the same function
def test_a_batch_compares_the_whole_model(dense_model, sparse_model):
    model, params = dense_model
    roomy = sparse_model.with_moe(eval_capacity_factor=4.0, normalize_combine_weights=True)
    batch = random_batch(384)
    made, receipt = upcycle.upcycle(params, roomy, key=0, batch=batch)
    layers = receipt['function_check']['layers']
    assert len(layers) == 2
    for layer in layers.values():
        assert layer['covered'] == 1 and layer['gap'] < 1e-5
    assert abs(receipt['function_check']['whole_model']['loss_gap']) < 1e-4
    np.testing.assert_allclose(roomy.logits(made, batch), model.logits(params, batch), atol=1e-4)
    hidden, _ = upcycle.upcycle(params, roomy, upcycle.Surgery(router_init='hidden'), key=0, batch=batch)
    assert np.isfinite(flat(hidden)['params/decoder/layers_0/mlp/router/router_weights/w/kernel']).all()


def test_the_result_shares_no_memory_with_its_source(dense_model, sparse_model):
    _, params = dense_model
    made, _ = upcycle.upcycle(params, sparse_model, key=0)
    kept = made['token_embedder']['embedding']
    assert kept.unsafe_buffer_pointer() != params['token_embedder']['embedding'].unsafe_buffer_pointer()
    jax.tree.map(lambda leaf: leaf.delete(), made)
    assert np.isfinite(params['token_embedder']['embedding']).all()


def test_plans_of_a_path_a_model_and_parameters_are_one(dense_model, sparse_model, untrained):
    model, params = dense_model
    plans = [upcycle.plan(source, sparse_model) for source in (untrained, model, params)]
    assert plans[0].rows == plans[1].rows == plans[2].rows
    assert {str(row.action) for row in plans[0].rows} == {'keep', 'experts', 'router'}


def test_more_experts_out_of_experts_and_out_of_several_models(sparse_model, dense_model):
    _, params = dense_model
    few = sparse_model.with_moe(num_experts=2)
    start, _ = upcycle.upcycle(params, few, upcycle.Surgery('noise'), key=0)
    grow = upcycle.Surgery('grow', router_init='copied')
    grown, receipt = upcycle.upcycle(start, sparse_model, grow, key=0)
    name = 'params/decoder/layers_0/mlp/expert/wo/kernel'
    np.testing.assert_array_equal(flat(grown)[name][2:], flat(start)[name])
    assert receipt['lineage']['params/decoder/layers_0/mlp'] == [[0], [1], [0], [1]]
    twice = jax.tree.map(lambda leaf: 2 * leaf, params)
    mixed, _ = upcycle.upcycle([params, twice], few, upcycle.Surgery('branches'), key=0)
    np.testing.assert_array_equal(flat(mixed)[name][1], 2 * flat(params)[name.replace('expert/', '')])


def test_a_vit_and_its_recipe(tmp_path):
    tree = trees.vit(False, state=False)
    tree.pop('step')
    model, params = upcycle.load(trees.write(tmp_path / 'vit.npz', 'vit_npz', tree))
    sparse = upcycle.sparse(model, NUM_EXPERTS=4, GROUP_IMAGES=1, EVAL_EXPERT_CAPACITY_FACTOR=4.0)
    assert sparse.config.group_images == 1 and sparse.dense().config == dataclasses.replace(
        model.config, group_images=1
    )
    image = {'image': np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)}
    made, receipt = upcycle.upcycle(params, sparse, key=0)
    # Every expert takes every token, with normalised weights.
    np.testing.assert_allclose(sparse.logits(made, image), model.logits(params, image), atol=1e-4)
    assert receipt['function_check']['layers'].keys() == sparse.moe_layers().keys()


def test_recipes(dense_model):
    model, _ = dense_model
    soft = upcycle.sparse(
        model, 'recipes/soft_moe.gin', NUM_EXPERTS=2, ENCODER_MOE_LAYERS=(0,), DECODER_MOE_LAYERS='none'
    )
    # DECODER_MOE_LAYERS has the value of the dense model's file, and the model has another.
    assert [moe.router for moe in soft.moe_layers().values()] == ['soft']
    with pytest.raises(UserError, match='gin.NUM_EXPERT=2'):
        upcycle.sparse(model, NUM_EXPERT=2)


def test_train_is_the_command(untrained, tmp_path):
    bindings = runs.bindings('upcycle', tmp_path / 'run', 5, INITIAL_CHECKPOINT_PATH=untrained, **runs.ONE_SPARSE_LAYER)
    state = upcycle.train(runs.FILES['upcycle'], **bindings | {'TRAIN_STEPS': 5, 'EVAL_PERIOD': 100})
    assert int(state.step) == 5
    model, params = upcycle.load(tmp_path / 'run')
    assert_same(flat(params), flat(state.params))
    assert len(model.moe_layers()) == 2


@pytest.mark.parametrize('key', [0, 7, 2**31 - 1])
def test_keys_of_seeds(key):
    assert seed_of(as_key(key)) == seed_of(as_key(jax.random.PRNGKey(key))) == key


def test_keys_that_no_seed_gives_are_told_by_their_words():
    key = jax.random.split(jax.random.key(0))[1]
    assert seed_of(key) == np.asarray(jax.random.key_data(key)).tolist()
    for wrong in (None, 1.5, True, jax.random.split(key), 'x'):
        with pytest.raises(UserError, match='must be one key'):
            as_key(wrong)


def nan_in_one_leaf(params):
    return jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(np.nan), params)


REFUSED = {
    'operator=None': lambda d, p, s: upcycle.upcycle(p, s, upcycle.Surgery(None), key=0),
    "optimizer_state='tile'": lambda d, p, s: upcycle.upcycle(p, s, upcycle.Surgery(optimizer_state='tile'), key=0),
    'pass a batch': lambda d, p, s: upcycle.upcycle(p, s, upcycle.Surgery(router_init='hidden'), key=0),
    'no MoE layers': lambda d, p, s: upcycle.upcycle(p, d, key=0),
    'must be a model of this package': lambda d, p, s: upcycle.plan(p, p),
    'must be nested dicts': lambda d, p, s: upcycle.plan(3, s),
    'list of dense models is empty': lambda d, p, s: upcycle.plan([], s),
    'NaN or infinite': lambda d, p, s: upcycle.upcycle(nan_in_one_leaf(p), s, key=0),
    'is not used by the model': lambda d, p, s: upcycle.plan({**p, 'more': {'w': p['token_embedder']['embedding']}}, s),
    'has no source': lambda d, p, s: upcycle.plan({'decoder': p['decoder']}, s),
    "format='zip'": lambda d, p, s: upcycle.convert((), 'x', 'y', format='zip'),
    'optimizer state of our models': lambda d, p, s: upcycle.plan(upcycle.State(p, None, id), s),
    'names 2 checkpoints': lambda d, p, s: upcycle.upcycle([p, p], s, key=0),
}


@pytest.mark.parametrize('message', REFUSED)
def test_refusals(message, dense_model, sparse_model):
    with pytest.raises(UserError, match=message):
        REFUSED[message](*dense_model, sparse_model)
