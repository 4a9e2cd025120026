"""Conversion between all formats and back, dense and MoE, with and without optimizer state, is exact or refused by name."""

import itertools
import os

import numpy as np
import pytest

from tests.checkpoints import trees
from upcycle.checkpoints import FORMATS, open_checkpoint
from upcycle.errors import UserError
from upcycle.transfer import transfer

MODELS = {
    't5 dense': lambda state: trees.t5(False, state=state),
    't5 moe': lambda state: trees.t5(True, state=state),
    'umt5 dense': lambda state: trees.t5(False, state=state, position_biases='every_layer'),
    'umt5 moe': lambda state: trees.t5(True, state=state, position_biases='every_layer'),
    'vit dense': lambda state: trees.vit(False, state=state),
    'vit moe': lambda state: trees.vit(True, state=state),
}


def holds(format, model, state):
    """Whether a format has a place for a model."""
    family, kind = model.removeprefix('um').split()
    return {
        'upcycle': True,
        't5x_legacy': family == 't5',
        't5x_orbax': family == 't5',
        'huggingface': kind == 'dense' and not state,
        'vit_npz': family == 'vit' and not state,
    }[format]


def path_for(folder, format):
    return folder / ('model.npz' if format == 'vit_npz' else format)


def kept(format, tree):
    """Returns the leaves that a format stores: only ours stores the run's random key."""
    return {name: value for name, value in tree.items() if name != 'rng' or format == 'upcycle'}


def _often(model):
    # Position biases in every layer only change names.
    return pytest.param(model, marks=pytest.mark.exhaustive) if model == 'umt5 moe' else model


def _pair(source, target):
    # Each reader and writer is combined with ours; no code depends on the pair of formats.
    return pytest.param(source, target, marks=[] if 'upcycle' in (source, target) else pytest.mark.exhaustive)


@pytest.mark.parametrize('state', [False, True], ids=['parameters', 'state'])
@pytest.mark.parametrize('model', [_often(model) for model in MODELS])
@pytest.mark.parametrize(('source', 'target'), [_pair(*pair) for pair in itertools.product(FORMATS, FORMATS)])
def test_round_trip(source, target, model, state, tmp_path, capsys):
    tree = MODELS[model](state)
    if not holds(source, model, state):
        with pytest.raises(UserError, match='params/|opt_state/'):
            trees.write(path_for(tmp_path, source), source, tree)
        assert os.listdir(tmp_path) == []
        return
    written = trees.write(path_for(tmp_path, source), source, tree)
    tree = kept(source, tree)
    trees.assert_same(open_checkpoint(written), tree)
    place = path_for(tmp_path / 'again', target)
    if not holds(target, model, state):
        with pytest.raises(UserError, match='cannot be stored as'):
            transfer(written, place, target)
        assert not (tmp_path / 'again').exists()
        return
    again = transfer(written, place, target)
    if source == target == 'upcycle':
        assert 'left out' not in capsys.readouterr().out
    trees.assert_same(open_checkpoint(again), kept(target, tree))
    back = transfer(again, path_for(tmp_path / 'back', source), source)
    trees.assert_same(open_checkpoint(back), kept(target, kept(source, tree)))


@pytest.mark.parametrize('format', ['upcycle', 't5x_legacy', 't5x_orbax'])
def test_bfloat16_and_its_moments(format, tmp_path):
    import ml_dtypes

    tree = {
        name: value.astype(ml_dtypes.bfloat16) if name.startswith('params/') and 'router' not in name else value
        for name, value in trees.t5(True, state=True).items()
    }
    reader = open_checkpoint(trees.write(tmp_path / 'x', format, tree))
    trees.assert_same(reader, kept(format, tree))
    cast = transfer(
        trees.write(tmp_path / 'y', format, trees.t5(True, state=True)), tmp_path / 'z', format, dtype='bfloat16'
    )
    trees.assert_same(open_checkpoint(cast), kept(format, tree))


def test_negative_zero_survives_the_tokens_position(tmp_path):
    tree = trees.vit(False, state=False)
    tree['params/cls'] = np.full_like(tree['params/cls'], -0.0)
    trees.assert_same(open_checkpoint(trees.write(tmp_path / 'x', 'huggingface', tree)), tree)


@pytest.mark.parametrize('mlp_dim', [8, 16, 24])
def test_t5x_names_the_statistics_of_experts_by_meaning(mlp_dim, tmp_path):
    """In narrow experts the model width is the larger axis."""
    tree = trees.t5(True, state=True, mlp_dim=mlp_dim)
    path = trees.write(tmp_path / 'x', 't5x_legacy', tree)
    trees.assert_same(open_checkpoint(path), kept('t5x_legacy', tree))
    import flax.serialization

    with open(os.path.join(path, 'checkpoint'), 'rb') as file:
        index = flax.serialization.msgpack_restore(file.read())
    states = index['optimizer']['state']['param_states']['encoder']['layers_1']['mlp']['expert']
    for matrix in ('wi_0', 'wi_1', 'wo'):
        assert states[matrix]['kernel']['v_row'].shape == (4, 16)
        assert states[matrix]['kernel']['v_col'].shape == (4, mlp_dim)


def test_one_chunk_is_one_expert(tmp_path):
    rng = np.random.default_rng(0)
    tree = {'params/mlp/expert/wo/kernel': rng.normal(size=(4, 300, 300)).astype('f'), 'step': np.int32(1)}
    for format in ('upcycle',):
        path = trees.write(tmp_path / format, format, tree)
        chunks = [name for name in os.listdir(f'{path}/state/params.mlp.expert.wo.kernel') if name != 'zarr.json']
        assert sorted(chunks) == [f'{e}.0.0' for e in range(4)]
        reader = open_checkpoint(path)
        os.remove(f'{path}/state/params.mlp.expert.wo.kernel/3.0.0')
        third = reader.read('params/mlp/expert/wo/kernel', region=(slice(2, 3),))
        np.testing.assert_array_equal(third, tree['params/mlp/expert/wo/kernel'][2:3])
        with pytest.raises(UserError, match='params/mlp/expert/wo/kernel of .*missing'):
            reader.read('params/mlp/expert/wo/kernel')


def test_orbax_restores_what_we_wrote(tmp_path):
    import orbax.checkpoint as ocp

    tree = trees.t5(True, state=True)
    path = trees.write(tmp_path / 'x', 'upcycle', tree)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(f'{path}/state')
    np.testing.assert_array_equal(
        restored['params']['encoder']['layers_1']['mlp']['expert']['wo']['kernel'],
        tree['params/encoder/layers_1/mlp/expert/wo/kernel'],
    )
    path = trees.write(tmp_path / 'y', 't5x_orbax', tree)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
    options = ocp.CheckpointManagerOptions(step_prefix='checkpoint')
    manager = ocp.CheckpointManager(tmp_path / 'y', options=options, item_handlers={'state': handler})
    assert manager.all_steps() == [trees.STEP]
    restored = manager.restore(trees.STEP, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))['state']
    slots = restored['state']['param_states']['decoder']['layers_1']['mlp']['expert']['wi_0']['kernel']
    assert {name: slot.shape for name, slot in slots.items()} == {
        'm': (1,),
        'v': (1,),
        'v_row': (4, 16),
        'v_col': (4, 24),
    }
    manager.close()
