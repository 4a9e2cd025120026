"""models/from_checkpoint.gin takes the model from the checkpoint, and a resumed run from its own config.gin."""

import dataclasses
import os
import shutil

import pytest

import upcycle
from tests import runs, vision
from tests.fixtures import fixtures_dir, requires_fixtures
from tests.test_cli import call
from upcycle import configuration, run_config
from upcycle.checkpoints import open_checkpoint
from upcycle.commands import train
from upcycle.errors import UserError
from upcycle.gin_files import FROM_CHECKPOINT

FIXTURES = {'': 'dense', 'llm': 'dense_llm', 'vit': 'dense_vit'}


def files_of(kind):
    return (FROM_CHECKPOINT, *runs.FILES[kind][1:])


def bindings_of(kind, folder, steps, dense, **more):
    # Sizes of the model are unused; NUM_EMBEDDINGS is also the vocabulary of the task.
    bindings = runs.bindings(kind, folder, steps, INITIAL_CHECKPOINT_PATH=dense, **more)
    return {name: value for name, value in bindings.items() if not (kind.startswith('vit') and name in vision.SIZES)}


@pytest.mark.parametrize('kind', ['upcycle', 'llm continue', 'vit upcycle'])
def test_is_the_model_of_the_familys_own_files(kind, request, tmp_path):
    dense = request.getfixturevalue(FIXTURES[kind.split()[0] if ' ' in kind else ''])
    more = {'ACTIVATION_DTYPE': 'float32'}
    named = runs.build(kind, tmp_path / 'run', 6, INITIAL_CHECKPOINT_PATH=dense, **more)
    assert configuration.load(files_of(kind), bindings_of(kind, tmp_path / 'run', 6, dense, **more)) == named


def test_a_run_of_several_checkpoints_takes_the_first(dense, tmp_path):
    bindings = bindings_of('upcycle', tmp_path, 6, f"('{dense}/checkpoints/2', '{dense}')")
    files = (*files_of('upcycle'), 'surgery/branches.gin')
    assert (
        configuration.load(files, bindings).model
        == runs.build('upcycle', tmp_path, 6, INITIAL_CHECKPOINT_PATH=dense).model
    )


def test_an_moe_checkpoint_tells_its_layers(upcycled, tmp_path):
    files = files_of('continue')
    taken = configuration.load(files, bindings_of('continue', tmp_path / 'run', 8, upcycled))
    assert taken.model == runs.build('upcycle', tmp_path / 'run', 8, INITIAL_CHECKPOINT_PATH='x').model
    # A file of moe/ replaces them.
    more = {'NUM_EXPERTS': 8}
    grown = (*files_of('upcycle'), 'surgery/grow.gin')
    model = configuration.load(grown, bindings_of('upcycle', tmp_path / 'run', 8, upcycled, **more)).model
    assert {moe.num_experts for moe in model.moe_layers().values()} == {8}


@requires_fixtures
def test_attention_experts_are_told_by_the_checkpoint_and_by_the_run(tmp_path):
    source, folder, kind = fixtures_dir() / 'llm' / 'jetmoe', tmp_path / 'run', 'llm continue'
    bindings = bindings_of(kind, folder, 6, source, NUM_EMBEDDINGS=128)
    taken = configuration.load(files_of(kind), bindings)
    model, _ = upcycle.load(source)
    form = {'dtype': 'float32', 'expert_dropout_rate': None}
    assert dataclasses.replace(taken.model.config, **form) == model.config
    run_config.claim(taken, configuration.resolved())
    bindings['INITIAL_CHECKPOINT_PATH'] = repr('/nowhere')
    assert configuration.load(files_of(kind), bindings).model == taken.model


def test_a_run_resumes_without_the_checkpoint_that_it_started_from(dense, tmp_path, capsys):
    source, folder = tmp_path / 'dense', tmp_path / 'run'
    shutil.copytree(dense, source)
    begun = bindings_of('upcycle', folder, 6, source)
    train.run(files_of('upcycle'), begun)
    config = (folder / run_config.CONFIG).read_text()
    assert 'T5Config.emb_dim = 64' in config and 'from_checkpoint' not in config
    shutil.rmtree(source)
    state = train.run(files_of('upcycle'), begun | {'TRAIN_STEPS': '8'})
    assert int(state.step) == 8
    # The folder is complete without the checkpoint, too.
    assert call(['eval', f'--from={folder}'], capsys)[0] == 0
    with pytest.raises(UserError, match=r'holds another run, in which .*num_experts is 4 and not 2'):
        train.run(files_of('upcycle'), begun | {'NUM_EXPERTS': '2'})


def test_what_the_checkpoint_tells_cannot_be_set_by_a_macro(dense, tmp_path):
    with pytest.raises(UserError, match='--gin.EMBED_DIM=32 is unused in this run'):
        configuration.load(files_of('continue'), bindings_of('continue', tmp_path, 6, dense, EMBED_DIM=32))
    # The parameter can be bound, for operators that change sizes.
    deeper = bindings_of('continue', tmp_path, 6, dense) | {'T5Config.num_encoder_layers': '4'}
    assert configuration.load(files_of('continue'), deeper).model.config.num_encoder_layers == 4


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        (None, 'INITIAL_CHECKPOINT_PATH is not set, and models/from_checkpoint.gin takes the model from there'),
        ('/nowhere', '/nowhere does not exist'),
    ],
)
def test_refusals(path, message, tmp_path):
    bindings = bindings_of('continue', tmp_path, 6, path)
    with pytest.raises(UserError, match=message):
        configuration.load(files_of('continue'), bindings)


def test_convert_needs_no_file_of_a_model(dense, tmp_path, capsys):
    arguments = ['convert', f'--from={dense}', '--gin_file=moe/t5.gin', '--gin.NUM_EXPERTS=4', '--optimizer_state=none']
    assert call([*arguments, f'--to={tmp_path / "short"}'], capsys)[0] == 0
    arguments[1:1] = [f'--gin_file={runs.TINY}', '--gin.NUM_EMBEDDINGS=384']
    assert call([*arguments, f'--to={tmp_path / "long"}'], capsys)[0] == 0
    one, other = (open_checkpoint(tmp_path / name).metadata for name in ('short', 'long'))
    assert one['model']['config'] == other['model']['config']
    assert os.listdir(tmp_path / 'short') == os.listdir(tmp_path / 'long')
