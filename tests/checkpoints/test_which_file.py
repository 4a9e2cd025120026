"""Of several files or steps in one folder the right one is read, and a warning names the others."""

import json
import shutil

import numpy as np
import pytest

from tests.checkpoints import trees
from tests.checkpoints.test_hf import header_of, save
from upcycle import cli, warning
from upcycle.checkpoints import open_checkpoint
from upcycle.errors import UserError

EMBEDDING = 'params/token_embedder/embedding'
INDEX = 'model.safetensors.index.json'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A T5 in one file, from a seed."""
    path = tmp_path_factory.mktemp('whole') / 'model'
    trees.write(path, 'huggingface', trees.t5(False, state=False))
    return path


@pytest.fixture
def folder(tmp_path, whole):
    shutil.copytree(whole, tmp_path / 'model')
    return tmp_path / 'model'


@pytest.fixture
def said(capsys):
    def warnings():
        return capsys.readouterr().err

    warning.forget()
    return warnings


def ones(folder, file='model-00001-of-00001.safetensors', index=INDEX):
    """Adds another model, all ones, in a shard and with an index."""
    header, data = header_of(folder / 'model.safetensors')
    save(folder / file, header, np.ones(len(data) // 4, np.float32).tobytes())
    if index:
        names = [name for name in header if name != '__metadata__']
        (folder / index).write_text(json.dumps({'weight_map': dict.fromkeys(names, file)}))


def is_ones(path):
    return bool((open_checkpoint(path).read(EMBEDDING) == 1).all())


def test_the_whole_file_counts_before_the_index(folder, said):
    ones(folder)
    assert not is_ones(folder)
    text = said()
    assert (
        text.count('warning:') == 1 and f'{folder / INDEX} and its files are ignored: model.safetensors is read' in text
    )
    assert is_ones(folder / INDEX) and said() == ''  # whoever names the index gets it
    (folder / 'model.safetensors').unlink()
    assert is_ones(folder) and is_ones(folder / 'model-00001-of-00001.safetensors') and said() == ''


@pytest.mark.parametrize(
    'index', ['{', '{}', '[]', '{"weight_map": {"shared.weight": "model-00001-of-00009.safetensors"}}']
)
def test_an_index_of_shards_that_are_gone_is_passed_over(folder, said, index):
    (folder / INDEX).write_text(index)
    assert not is_ones(folder)
    assert f'{INDEX} and its files are ignored' in said()


def test_an_index_of_the_whole_file_is_nothing_to_speak_of(folder, said):
    names = [name for name in header_of(folder / 'model.safetensors')[0] if name != '__metadata__']
    (folder / INDEX).write_text(json.dumps({'weight_map': dict.fromkeys(names, 'model.safetensors')}))
    assert not is_ones(folder) and said() == ''


def test_a_variant_counts_where_it_is_named(folder, said):
    ones(folder, 'model.fp16.safetensors', None)
    assert not is_ones(folder) and is_ones(folder / 'model.fp16.safetensors')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'transformers_weights': 'model.fp16.safetensors'}))
    assert is_ones(folder) and said() == ''
    (folder / 'config.json').write_text(json.dumps(config | {'transformers_weights': '../x.safetensors'}))
    with pytest.raises(UserError, match='transformers_weights'):
        open_checkpoint(folder)


ALONE = {
    'model.fp16.safetensors': r'holds model.fp16.safetensors instead of model.safetensors: name the file itself',
    'model-00001-of-00002.safetensors': 'holds model-00001-of-00002.safetensors but no model.safetensors.index.json',
    'model.safetensors.index.fp16.json': 'name the file itself, .*model.safetensors.index.fp16.json',
    'pytorch_model.bin': 'pytorch_model.bin, a pickle, which is never opened',
    'pytorch_model-00001-of-00002.bin': 'a pickle, which is never opened',
    'pytorch_model.fp16.bin': 'a pickle, which is never opened',
    'tf_model.h5': 'tf_model.h5, which cannot be read: save the model again',
    'flax_model.msgpack': 'flax_model.msgpack, which cannot be read',
    'adapter_config.json': 'is an adapter and not a model: .*merge_and_unload',
    'adapter_model.safetensors': 'is an adapter and not a model: .*merge_and_unload',
}


@pytest.mark.parametrize('name', ALONE)
def test_a_folder_without_the_file_that_counts(folder, name):
    (folder / 'model.safetensors').rename(folder / name)
    with pytest.raises(UserError, match=ALONE[name]) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value) and '\n' not in str(caught.value)
    if 'never opened' in ALONE[name] or 'cannot be read' in ALONE[name]:
        with pytest.raises(UserError, match=ALONE[name]):
            open_checkpoint(folder / name)


def test_the_index_of_a_variant_counts_where_it_is_named(folder):
    ones(folder, 'model.fp16-00001-of-00001.safetensors', 'model.safetensors.index.fp16.json')
    assert not is_ones(folder) and is_ones(folder / 'model.safetensors.index.fp16.json')


def test_a_file_that_is_not_the_model_itself(folder):
    (folder / 'model.safetensors').rename(folder / 'adapter_model.safetensors')
    with pytest.raises(UserError, match='adapter_model.safetensors is an adapter and not a model'):
        open_checkpoint(folder / 'adapter_model.safetensors')
    (folder / 'model.safetensors').symlink_to('../../blobs/0123')
    with pytest.raises(UserError, match='model.safetensors is a dangling link'):
        open_checkpoint(folder)
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
    with pytest.raises(UserError, match='model.safetensors is a pointer of Git LFS'):
        open_checkpoint(folder)


def test_an_adapter_beside_a_model_is_passed_over(folder, said):
    (folder / 'adapter_config.json').write_text('{}')
    open_checkpoint(folder)
    assert 'adapter_config.json is ignored' in said()


def rename(folder, change):
    header, data = header_of(folder / 'model.safetensors')
    save(folder / 'model.safetensors', {n if n == '__metadata__' else change(n): v for n, v in header.items()}, data)


@pytest.mark.parametrize(
    'change',
    [
        lambda name: f'_orig_mod.{name}',
        lambda name: f'module.{name}',
        lambda name: f'model.{name}',
        lambda name: f'module._orig_mod.{name}',
        lambda name: f'model._forward_module._orig_mod.{name}',
        lambda name: name.replace('encoder.', 'encoder._orig_mod.'),
        lambda name: name.replace('.layer.0.', '.layer.0._fsdp_wrapped_module.'),
    ],
)
def test_names_of_wrapped_modules(folder, change):
    rename(folder, change)
    trees.assert_same(open_checkpoint(folder), trees.t5(False, state=False))


def test_a_model_inside_another_one(folder):
    rename(folder, lambda name: f't5.{name}')
    with pytest.raises(UserError, match="names of 52 arrays begin with 't5.', .*save the inner model"):
        open_checkpoint(folder)


def test_two_arrays_of_one_name(folder):
    rename(folder, lambda name: 'module.shared.weight' if name == 'lm_head.weight' else name)
    with pytest.raises(UserError, match='has two arrays for shared.weight: (module.)?shared.weight and'):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    'name', ['base_model.model.{}', '{}.lora_A.default.weight', '{}.base_layer.weight', 'lora_embedding_A.{}']
)
def test_an_adapter_that_is_not_merged(folder, name):
    rename(folder, lambda old: name.format(old) if old == 'encoder.block.0.layer.0.SelfAttention.q.weight' else old)
    with pytest.raises(UserError, match='an adapter that is not merged .*merge_and_unload'):
        open_checkpoint(folder)


STEPS = {
    'upcycle': ('checkpoints/{}', 'checkpoints/{}.orbax-checkpoint-tmp-7'),
    't5x_legacy': ('checkpoint_{}', 'checkpoint_{}.tmp-1700000000'),
    't5x_orbax': ('checkpoint_{}', 'checkpoint_{}.orbax-checkpoint-tmp'),
}


REASONS = {
    'half copied': 'it has neither `checkpoint`',
    'empty': 'it is empty',
    'not finished': 'its save was interrupted',
    'damaged': 'it was set aside as damaged',
}


@pytest.fixture(scope='module', params=STEPS)
def written(request, tmp_path_factory):
    """A folder with step 100, for each format of steps."""
    path = tmp_path_factory.mktemp('steps') / request.param
    trees.write(path, request.param, trees.t5(False, state=False))
    return request.param, path


@pytest.fixture
def steps(written, tmp_path):
    format, path = written
    shutil.copytree(path, tmp_path / 'run')
    return tmp_path / 'run', *STEPS[format]


@pytest.mark.parametrize('kind', ['half copied', 'empty', 'not finished', 'damaged'])
def test_a_newer_step_that_is_passed_over_is_reported(steps, said, kind):
    run, finished, unfinished = steps
    newer = run / (unfinished if kind == 'not finished' else finished).format(2000)
    if kind == 'half copied':
        shutil.copytree(run / finished.format(100), newer)
        for name in ('checkpoint', 'state/_METADATA'):
            (newer / name).unlink(missing_ok=True)
    elif kind == 'damaged':
        newer = (run / finished.format(100)).with_name('2000.damaged')
        newer.mkdir()
    else:
        newer.mkdir()
    for older in (finished.format(3), unfinished.format(100)):
        (run / older).mkdir()
    assert open_checkpoint(run).step == 100
    text = said()
    assert f'{newer} is skipped (' in text and '100 is read instead' in text and text.count('warning:') == 1
    assert REASONS[kind] in text
    open_checkpoint(run / finished.format(100))
    assert said() == ''


@pytest.mark.parametrize('kind', ['a dangling link', 'a file'])
def test_a_newer_step_that_is_no_folder_is_reported(steps, said, kind):
    run, finished, _ = steps
    newer = run / finished.format(2000)
    newer.write_bytes(b'') if kind == 'a file' else newer.symlink_to('/nowhere/2000')
    (run / finished.format(3)).symlink_to('/nowhere/3')
    assert open_checkpoint(run).step == 100
    text = said()
    assert f'{newer} is skipped (' in text and text.count('warning:') == 1
    assert f'it is {kind}' in text


def test_a_newer_step_whose_arrays_have_not_all_arrived(steps, said):
    run, finished, _ = steps
    newer = run / finished.format(2000)
    shutil.copytree(run / finished.format(100), newer)
    array = next(path for path in newer.rglob('*mlp.wo.kernel') if path.is_dir())
    shutil.rmtree(array)
    assert open_checkpoint(run).path == str(run / finished.format(100))
    assert f'{newer} is skipped' in (text := said()) and 'arrays: 1' in text and 'mlp/wo/kernel' in text
    shutil.rmtree(run / finished.format(100))
    with pytest.raises(
        UserError,
        match='2000 is skipped .missing arrays: 1, such as .*wo/kernel.* copy ',
    ):
        open_checkpoint(run)


def test_steps_that_are_all_half_copied(steps):
    run, finished, unfinished = steps
    shutil.rmtree(run / finished.format(100))
    (run / finished.format(3)).mkdir()
    (run / unfinished.format(4)).mkdir()
    with pytest.raises(
        UserError, match='holds no checkpoint .*4.* is skipped .its save was interrupted.; .*3 is skipped'
    ):
        open_checkpoint(run)


def test_warnings_come_below_a_listing(folder, capfd):
    ones(folder)
    assert cli.run(['inspect', '--quick', str(folder)]) == 0
    out, error = capfd.readouterr()
    assert 'token_embedder' in out and error.count('are ignored') == 1
    assert cli.run(['inspect', '--quick', '--json', str(folder)]) == 0
    out, error = capfd.readouterr()
    assert json.loads(out)['step'] == 100 and error.count('are ignored') == 1
