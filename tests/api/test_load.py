"""`load` and `logits`: parity with the originals, every format, both families, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import upcycle
from tests.checkpoints import trees
from tests.fixtures import fixtures_dir, requires_fixtures
from tests.models import test_vit
from tests.small import fixture, fixture_batch
from upcycle import partitioning
from upcycle.errors import UserError

TOKENS = {
    'encoder_input_tokens': np.array([[3, 5, 7, 1], [4, 1, 0, 0]]),
    'decoder_input_tokens': np.array([[0, 8, 9], [0, 6, 2]]),
}
IMAGES = {'image': np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)}


@requires_fixtures
@pytest.mark.parametrize('folder', ['t5x_dense_legacy', 't5x_dense_orbax'])
def test_logits_of_t5x(folder):
    arrays = fixture('t5x_dense_reference.npz')
    model, params = upcycle.load(fixtures_dir() / folder)
    logits = jax.jit(model.logits)(params, fixture_batch(arrays, 'input/'))
    np.testing.assert_allclose(logits, arrays['logits'], atol=1e-5)
    assert logits.dtype == jnp.float32


@requires_fixtures
def test_logits_of_vmoes_dense_vit(tmp_path):
    tree = trees.flatten_dict({'params': test_vit.tree('dense/params/')}, sep='/')
    model, params = upcycle.load(trees.write(tmp_path / 'vit.npz', 'vit_npz', tree))
    logits = jax.jit(model.logits)(params, {'image': test_vit.arrays()['images']})
    np.testing.assert_allclose(logits, test_vit.arrays()['dense/logits'], atol=1e-5)


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
    """The tree of each family, and its path in each format."""
    folder = tmp_path_factory.mktemp('loaded')
    loaded_from = {}
    for family, tree, formats in (
        ('t5', trees.t5(False, state=False), ('t5x_legacy', 't5x_orbax', 'huggingface')),
        ('vit', trees.vit(False, state=False), ('vit_npz', 'huggingface')),
    ):
        tree.pop('step')
        for format in formats:
            stored = tree if format in ('vit_npz', 'huggingface') else tree | {'step': np.int32(1)}
            path = trees.write(folder / f'{family}_{format}{".npz" * (format == "vit_npz")}', format, stored)
            loaded_from[family, format] = tree, path
    return loaded_from


FORMATS = [('t5', 't5x_legacy'), ('t5', 't5x_orbax'), ('t5', 'huggingface'), ('vit', 'vit_npz'), ('vit', 'huggingface')]


@pytest.mark.parametrize('which', FORMATS)
def test_every_format(which, loaded):
    tree, path = loaded[which]
    model, params = upcycle.load(path)
    flat = trees.flatten_dict({'params': params}, sep='/')
    assert flat.keys() == tree.keys() and model.family == which[0]
    for name, leaf in flat.items():
        np.testing.assert_array_equal(leaf, tree[name], name)


def test_bfloat16_and_a_mesh(loaded):
    _, path = loaded['t5', 't5x_legacy']
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('expert',))
    model, params = upcycle.load(path, mesh=mesh, dtype='bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
        jnp.dtype('bfloat16')
    } and model.config.dtype == 'bfloat16'
    narrow = model.logits(params, TOKENS)
    assert narrow.dtype == jnp.float32 and narrow.shape == (2, 3, 40)
    assert np.isfinite(narrow).all()


def test_a_run_of_ours_has_the_configuration_that_it_was_trained_with(upcycled):
    model, params = upcycle.load(upcycled)
    assert len(model.moe_layers()) == 2 and model.config.dtype == 'float32'
    assert model.logits(params, TOKENS).shape == (2, 3, 384)


def test_moe_layers_of_other_programs_need_their_model(tmp_path):
    path = trees.write(tmp_path / 'moe', 't5x_legacy', trees.t5(True, state=False))
    with pytest.raises(UserError, match='does not describe their routing'):
        upcycle.load(path)
    dense, _ = upcycle.load(trees.write(tmp_path / 'dense', 't5x_legacy', trees.t5(False, state=False)))
    model, params = upcycle.load(path, model=upcycle.sparse(dense, NUM_EXPERTS=4))
    assert model.logits(params, TOKENS).shape == (2, 3, 40)
    with pytest.raises(UserError, match='router'):
        upcycle.load(path, model=upcycle.sparse(dense, NUM_EXPERTS=2))


def test_a_backbone_has_features_and_no_logits(tmp_path):
    tree = {name: leaf for name, leaf in trees.vit(False, state=False).items() if '/head/' not in name}
    tree.pop('step')
    model, params = upcycle.load(trees.write(tmp_path / 'vit.npz', 'vit_npz', tree))
    assert model.features(params, IMAGES).shape == (2, 16)
    with pytest.raises(UserError, match='no head'):
        model.logits(params, IMAGES)


@pytest.mark.parametrize(
    ('family', 'batch', 'message'),
    [
        ('t5', {'encoder_input_tokens': TOKENS['encoder_input_tokens']}, "no 'decoder_input_tokens'"),
        ('t5', TOKENS | {'decoder_input_tokens': np.zeros(3, int)}, 'decoder_input_tokens has type int'),
        ('t5', TOKENS | {'encoder_input_tokens': np.zeros((2, 3))}, 'encoder_input_tokens has type float'),
        ('vit', {}, "no 'image'"),
        ('vit', {'image': np.zeros((2, 8, 8, 3))}, r'must be \(batch, 12, 12, 3\)'),
    ],
)
def test_batches_that_are_refused(family, batch, message, loaded):
    model, params = upcycle.load(loaded[family, 'huggingface'][1])
    with pytest.raises(UserError, match=message):
        model.logits(params, batch)


def test_what_load_refuses(loaded):
    _, path = loaded['t5', 't5x_legacy']
    with pytest.raises(UserError, match="dtype='int8' must be one of float32"):
        upcycle.load(path, dtype='int8')
    with pytest.raises(UserError, match='axes named data, expert, model'):
        upcycle.load(path, mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), ('x',)))
    with pytest.raises(UserError, match=r"contains a model of the family 't5', and `model` is of 'vit'"):
        upcycle.load(path, model=upcycle.load(loaded['vit', 'vit_npz'][1])[0])
    assert partitioning.current_mesh() is None
