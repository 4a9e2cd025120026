import subprocess
import sys

import pytest

from upcycle.checkpoints import open_checkpoint
from upcycle.errors import UserError


def test_import_is_cheap():
    code = 'import sys, upcycle.checkpoints; assert not {"jax", "orbax", "tensorstore", "numpy"} & sys.modules.keys()'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match='missing does not exist: name a checkpoint'):
        open_checkpoint(tmp_path / 'missing')


@pytest.mark.parametrize('content', ['nothing', 'a file', 'an empty step', 'a step of another layout'])
def test_no_checkpoint(tmp_path, content):
    if content == 'a file':
        (tmp_path / 'notes.txt').write_text('')
    elif content == 'an empty step':
        (tmp_path / 'checkpoints' / '100').mkdir(parents=True)
    elif content == 'a step of another layout':
        (tmp_path / '100' / 'default').mkdir(parents=True)
    with pytest.raises(UserError, match='holds no checkpoint of a known format: looked for .*state/_METADATA'):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match='holds no checkpoint'):
        open_checkpoint(next(tmp_path.iterdir(), tmp_path))


def test_interrupted_t5x_save(tmp_path):
    (tmp_path / 'checkpoint_100.tmp-1700000000').mkdir()
    with pytest.raises(UserError, match='only interrupted saves .*checkpoint_100.tmp-'):
        open_checkpoint(tmp_path)


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'')


# Files, what is named, what the sentence says.
ELSEWHERE = {
    "Trainer's steps": (
        ['checkpoint-900/model.safetensors', 'checkpoint-1000/model.safetensors'],
        '',
        'checkpoint-1000, or another',
    ),
    'the cache of the hub': (['snapshots/c0ffee/model.safetensors', 'refs/main'], '', 'snapshots/c0ffee'),
    'a configuration': (['model.safetensors', 'config.json'], 'config.json', 'the folder above it'),
    'an Orbax item': (['100/state/_METADATA'], '100/state', 'the folder above it'),
    'an array of a legacy checkpoint': (['1/checkpoint', '1/target.x/.zarray'], '1/target.x', 'the folder above it'),
    'an archive': (['ViT-B_16.npz', 'README.md'], '', 'the file, .*ViT-B_16.npz'),
}


@pytest.mark.parametrize('case', ELSEWHERE)
def test_where_the_checkpoint_is_instead(case, tmp_path):
    names, named, words = ELSEWHERE[case]
    put(tmp_path, *names)
    with pytest.raises(UserError, match=f'is not a checkpoint: name .*{words}'):
        open_checkpoint(tmp_path / named)


def test_an_empty_step_does_not_lead_to_the_model_above_it(tmp_path):
    put(tmp_path, 'model.safetensors')
    (tmp_path / 'checkpoint-500').mkdir()
    with pytest.raises(UserError, match='holds no checkpoint of a known format'):
        open_checkpoint(tmp_path / 'checkpoint-500')


@pytest.mark.parametrize('name', ['zero_to_fp32.py', 'global_step5', '__0_0.distcp', 'model.ckpt-1000.index'])
def test_checkpoints_of_other_programs(name, tmp_path):
    put(tmp_path, name)
    with pytest.raises(UserError, match=f'holds {name}, which cannot be read: save the model again'):
        open_checkpoint(tmp_path)


def test_tensorflow_s_index(tmp_path):
    (tmp_path / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-1000"')
    with pytest.raises(UserError, match='belongs to a TensorFlow checkpoint, which cannot be read'):
        open_checkpoint(tmp_path)


def test_an_orbax_item_of_another_name(tmp_path):
    put(tmp_path, '100/default/_METADATA')
    with pytest.raises(UserError, match='100 is skipped .its Orbax item is `default` instead of'):
        open_checkpoint(tmp_path)
