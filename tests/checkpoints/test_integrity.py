"""Damaged steps are detected, named and set aside; a failed save leaves other steps unchanged."""

import json
import os
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle.checkpoints import integrity, native, open_checkpoint
from upcycle.errors import UserError, writing_to


def state(step, rows=64):
    values = np.random.default_rng(step).normal(size=(rows, 32))
    return {'step': jnp.int32(step), 'params': {'kernel': jnp.asarray(values, jnp.float32)}}


def abstract(of):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), of)


def save(folder, *steps, keep=None, rows=64):
    with native.CheckpointManager(folder, keep=keep) as manager:
        for step in steps:
            manager.save(step, state(step, rows), {'next_batch': step}, {'family': 't5'})


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp('saved')
    save(folder, 2, 4, 6)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / 'run')


def largest(step):
    return max((path for path in step.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def half_copied(step):
    for item in ('data', 'metadata'):
        shutil.rmtree(step / item)
    (step / integrity.RECORD).unlink()


def names_what_is_elsewhere(step):
    record = json.loads((step / integrity.RECORD).read_text())
    record['files']['state/../../../secret'] = record['files'].popitem()[1]
    (step / integrity.RECORD).write_text(json.dumps(record))


def names_no_file(step):
    path = step / integrity.RECORD
    path.write_text(path.read_text().replace('_METADATA', '\\u0000', 1))


DAMAGE = {
    'flipped byte of the weights': (lambda step: flip(largest(step)), r'bytes of state/\S+ have changed'),
    'truncated weights': (lambda step: truncate(largest(step)), r'state/\S+ has \d+ bytes but was saved with \d+'),
    'missing weights': (lambda step: largest(step).unlink(), r'state/\S+ is missing'),
    'flipped byte of the index': (
        lambda step: flip(step / 'state' / '_METADATA'),
        'bytes of state/_METADATA have changed',
    ),
    'metadata in place of data': (
        lambda step: shutil.copy(step / 'metadata' / 'metadata', step / 'data' / 'metadata'),
        'data/metadata has',
    ),
    'missing item': (lambda step: shutil.rmtree(step / 'metadata'), r'metadata/\S+ is missing'),
    'truncated record': (lambda step: truncate(step / integrity.RECORD), 'checksums.json cannot be read'),
    'record of another folder': (names_what_is_elsewhere, r"checksums.json names 'state/\.\./\.\./\.\./secret'"),
    'record of nothing': (names_no_file, r"checksums.json names 'state/\\x00'"),
    'missing record': (lambda step: (step / integrity.RECORD).unlink(), 'checksums.json is missing'),
    'half of a copy': (half_copied, 'checksums.json is missing'),
    'nothing in it': (lambda step: [shutil.rmtree(step), step.mkdir()], 'checksums.json is missing'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_step_is_set_aside_and_the_one_before_it_taken(kind, run, capsys):
    break_it, words = DAMAGE[kind]
    steps = run / 'checkpoints'
    assert integrity.newest_whole_step(run) == 6
    break_it(steps / '6')
    (steps / '8.orbax-checkpoint-tmp').mkdir()
    left = sorted(path.name for path in (steps / '6').rglob('*'))
    capsys.readouterr()
    assert integrity.newest_whole_step(run) == 4
    said = capsys.readouterr().err
    assert re.search(rf'^{steps}/6 is damaged \({words}.*\): .* step 4 is the newest', said)
    assert said.count('\n') == 1
    assert sorted(path.name for path in (steps / '6.damaged').rglob('*')) == left, 'nothing is lost'
    with native.CheckpointManager(run, keep=None) as manager:
        restored, data, _ = manager.restore(4, abstract(state(4)))
    np.testing.assert_array_equal(restored['params']['kernel'], state(4)['params']['kernel'])
    assert data == {'next_batch': 4}
    # The step can be saved again, and set aside again.
    save(run, 6)
    assert open_checkpoint(run).step == integrity.newest_whole_step(run) == 6
    break_it(steps / '6')
    assert integrity.newest_whole_step(run) == 4
    assert {'6.damaged', '6.damaged-2'} <= set(os.listdir(steps))


def test_of_several_damaged_steps_each_is_named(run, capsys):
    for step in ('6', '4'):
        truncate(largest(run / 'checkpoints' / step))
    assert integrity.newest_whole_step(run) == 2
    said = capsys.readouterr().err
    assert '/6 is damaged' in said and '/4 is damaged' in said
    assert sorted(os.listdir(run / 'checkpoints')) == ['2', '4.damaged', '6.damaged']


def test_where_no_step_is_whole_the_run_is_refused_and_left_as_it_is(run):
    for step in ('2', '4', '6'):
        flip(largest(run / 'checkpoints' / step))
    with pytest.raises(
        UserError, match=r'no step .* is whole \(step 6: .*; step 4: .*; step 2: bytes of state/'
    ) as caught:
        integrity.newest_whole_step(run)
    assert '\n' not in str(caught.value)
    assert sorted(os.listdir(run / 'checkpoints')) == ['2', '4', '6']


def test_nothing_saved_is_nothing_damaged(tmp_path):
    assert integrity.newest_whole_step(tmp_path / 'none') is None
    (tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp').mkdir(parents=True)
    assert integrity.newest_whole_step(tmp_path) is None


def test_steps_of_older_versions_are_taken_as_their_format_finds_them(run, capsys):
    """They have no record. All later steps have one, so a later step without it is damaged."""
    for step in ('2', '4', '6'):
        (run / 'checkpoints' / step / integrity.RECORD).unlink()
    assert integrity.newest_whole_step(run) == 6
    assert '6 has no checksums.json, because an older version saved it' in capsys.readouterr().err
    save(run, 8)
    flip(largest(run / 'checkpoints' / '8'))
    assert integrity.newest_whole_step(run) == 6


def test_the_checkpoint_to_start_from_is_refused(run):
    step = run / 'checkpoints' / '6'
    integrity.require_whole(str(step))
    flip(largest(step))
    with pytest.raises(
        UserError, match=r'6 is damaged \(bytes of state/\S+ have changed.*: copy it again, or name an earlier'
    ):
        integrity.require_whole(open_checkpoint(run).path)


def test_older_steps_go_when_the_new_one_has_been_read_back(tmp_path, monkeypatch):
    save(tmp_path, 1)
    seen = []
    write = integrity.write_record

    def look(folder):
        seen.append((folder.name, sorted(path.name for path in folder.parent.iterdir())))
        write(folder)

    monkeypatch.setattr(integrity, 'write_record', look)
    save(tmp_path, 2, keep=1)
    assert seen == [('2.orbax-checkpoint-tmp', ['1', '2.orbax-checkpoint-tmp'])]
    assert os.listdir(tmp_path / 'checkpoints') == ['2']
    monkeypatch.setattr(native.NativeReader, 'leaves', lambda self: {})
    with pytest.raises(UserError, match='step 3 cannot be saved .*does not hold the leaves that were saved'):
        save(tmp_path, 3, keep=1)
    assert integrity.newest_whole_step(tmp_path) == 2


@pytest.fixture
def full_disk():
    """Limits the size of files, which fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_steps_before_whole(run, full_disk, caplog):
    manager = native.CheckpointManager(run, keep=1)
    full_disk(100_000)
    with (
        pytest.raises(UserError, match=r'step 8 cannot be saved to \S+/checkpoints \(File too large\)') as caught,
        manager,
    ):
        manager.save(8, state(8, rows=10_000), {}, {})
    assert '\n' not in str(caught.value)
    assert not [record for record in caplog.records if record.exc_info], 'tracebacks'
    full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert sorted(os.listdir(run / 'checkpoints'))[:3] == ['2', '4', '6']
    assert integrity.newest_whole_step(run) == 6
    save(run, 8)
    assert integrity.newest_whole_step(run) == 8


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        sentence = rf'{folder} cannot be written \((File exists|Not a directory)\)'
        with pytest.raises(UserError, match=sentence), writing_to(folder):
            folder.mkdir()
    with pytest.raises(FileNotFoundError), writing_to(tmp_path):
        (tmp_path / 'none').read_text()
