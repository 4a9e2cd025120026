"""`upcycle import` and `upcycle export`: refusals, interrupted writes and their continuation."""

import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import jax
import numpy as np
import pytest
from etils import epath

from tests.checkpoints import trees, vits
from tests.test_cli import call
from upcycle import outputs
from upcycle.checkpoints import (
    create_checkpoint,
    folder_writer,
    journal,
    native,
    open_checkpoint,
    staging,
    t5x,
    writing,
)
from upcycle.errors import UserError
from upcycle.transfer import transfer, write


def transfer_by_command(tmp_path, capsys, source, *more, name='import'):
    return call([name, '--from', str(source), '--to', str(tmp_path / 'out'), *more], capsys)


def source_and_target(format, folder):
    """Returns a checkpoint that can be written in a format, and a target."""
    if format == 'vit_npz':
        np.savez(folder / 'source.npz', **vits.ours())
        return folder / 'source.npz', folder / 'out.npz'
    return trees.write(folder / 't5x', 't5x_orbax', trees.t5(False, state=False)), folder / 'out'


def test_import_and_export_by_command(tmp_path, capsys):
    tree = trees.t5(True, state=True)
    source = trees.write(tmp_path / 't5x', 't5x_orbax', tree)
    code, out, error = transfer_by_command(tmp_path, capsys, source, '--format=t5x_orbax')
    assert code == 0 and out == f'wrote {tmp_path}/out/checkpoints/100\n'
    assert re.search(r'writing  MB (\d+)/\1 .* MB/s', error)
    back = ['export', f'--from={tmp_path}/out', f'--to={tmp_path}/back', '--format=t5x_legacy', '--dtype=bfloat16']
    code, out, _ = call([*back, '--optimizer_state=none'], capsys)
    assert code == 0 and 'wrote' in out
    reader = open_checkpoint(tmp_path / 'back')
    assert reader.format == 't5x_legacy' and not [name for name in reader.leaves() if 'opt_state' in name]
    dtypes = {name.split('/')[-2]: leaf.dtype.name for name, leaf in reader.leaves().items() if '/mlp/' in name}
    assert dtypes == {'wi_0': 'bfloat16', 'wi_1': 'bfloat16', 'wo': 'bfloat16', 'w': 'float32'}
    assert reader.metadata['source'] == {'path': f'{tmp_path}/out/checkpoints/100', 'format': 'upcycle', 'step': 100}


@pytest.mark.parametrize('format', ['upcycle', 't5x_legacy', 'huggingface', 'vit_npz'])
def test_a_disk_that_is_full_at_the_end(format, tmp_path, monkeypatch):
    """The disk is full for the index or metadata. The same command continues when there is room."""
    source, target = source_and_target(format, tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    last = {
        'vit_npz': (zipfile.ZipFile, 'writestr'),
        't5x_legacy': (t5x.LegacyLayout, 'commit'),
        'upcycle': (native.NativeLayout, 'commit'),
        'huggingface': (os, 'fsync'),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*last[format], full)
        with pytest.raises(writing.WriteError, match='cannot be written .*No space left on device'):
            transfer(source, target, format)
    with pytest.raises(UserError):
        open_checkpoint(target)
    assert open_checkpoint(transfer(source, target, format)).leaves()


@pytest.mark.parametrize('format', ['upcycle', 't5x_legacy', 'huggingface', 'vit_npz'])
def test_two_commands_do_not_write_one_checkpoint(format, tmp_path, monkeypatch):
    source, target = source_and_target(format, tmp_path)
    refused = []

    def again(*arguments):
        monkeypatch.undo()
        with pytest.raises(
            UserError, match=f'{target}.* is being written by another process: wait for it to end'
        ) as error:
            transfer(source, target, format)
        refused.append(error)
        return write(*arguments)

    monkeypatch.setattr('upcycle.transfer.write', again)
    written = transfer(source, target, format)
    assert refused and open_checkpoint(written).leaves()


def test_a_claim_on_what_another_writer_has_just_finished(tmp_path, monkeypatch):
    """The other process renames the folder before this writer opens it."""
    place, opened = epath.Path(tmp_path / 'out.tmp'), os.open

    def finished(*arguments):
        monkeypatch.undo()
        os.rename(place, tmp_path / 'out')
        return opened(*arguments)

    monkeypatch.setattr(os, 'open', finished)
    staging.Claim(place, epath.Path(tmp_path / 'out'), outputs.Kind.NEW_FOLDER).release()
    assert place.is_dir()


# Changes of the tree, options, words of the message.
REFUSED = {
    'another format': ({}, ['--format=vit_npz'], ['upcycle, not vit_npz']),
    'no such format': ({}, ['--format=zip'], ['--format=zip is not one of']),
    'dtype': ({}, ['--dtype=int8'], ['--dtype=int8 must be one of']),
    'another step': ({}, ['--step=7'], ['is at step 100', '--step=7']),
    'a step below 0': ({'step': None}, ['--step=-1'], ['--step=-1 must be a whole number of at least 0']),
    'no number': ({'step': None}, ['--step=1e6'], ['--step=1e6 must be a whole number of at least 0']),
    'nothing': ({'step': None}, ['--step='], ['--step= must be a whole number']),
    'a step too far': ({'step': None}, ['--step=2147483648'], ['--step=2147483648 (beyond 2147483647']),
    'nan': (
        {'params/decoder/decoder_norm/scale': np.full(16, np.nan, 'f')},
        [],
        ['decoder_norm/scale', '16 numbers', 'NaN'],
    ),
    'infinite moments': (
        {'opt_state/param_states/decoder/decoder_norm/scale/v': np.full(16, np.inf, 'f')},
        [],
        ['decoder_norm/scale/v', 'infinite'],
    ),
    'a leaf of another shape': (
        {'params/encoder/layers_1/attention/out/kernel': np.ones((16, 12), 'f')},
        [],
        ['not a complete t5', 'attention/out/kernel is (16, 12)', '(12, 16)'],
    ),
    'a leaf too many': (
        {'params/encoder/adapter/kernel': np.ones(3, 'f')},
        [],
        ['encoder/adapter/kernel', 'is unknown'],
    ),
    'a leaf missing': (
        {'params/encoder/layers_0/mlp/wo/kernel': None},
        [],
        ['layers_0/mlp/wo/kernel (24, 16) is missing'],
    ),
    'a wrong type': ({'params/encoder/encoder_norm/scale': np.ones(16)}, [], ['encoder_norm/scale is float64']),
    'state of another shape': (
        {'opt_state/param_states/token_embedder/embedding/v_row': np.ones(7, 'f')},
        [],
        ['embedding/v_row is (7,)'],
    ),
    'state of nothing': (
        {'opt_state/param_states/x/v': np.ones(7, 'f')},
        [],
        ['x/v is optimizer state of an unknown parameter'],
    ),
    'experts and router': (
        {'params/encoder/layers_1/mlp/router/router_weights/w/kernel': np.ones((16, 5), 'f')},
        [],
        ['does not route to 4 experts'],
    ),
    'no embedding': ({'params/token_embedder/embedding': None}, [], ['token_embedder/embedding is missing']),
    'no model at all': (
        dict.fromkeys(('params/encoder/encoder_norm/scale', 'params/decoder/layers_0/self_attention/key/kernel')),
        [],
        ['neither a T5', 'nor a ViT', 'nor a decoder-only model'],
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_with_nothing_left_behind(case, tmp_path, capsys):
    changes, options, words = REFUSED[case]
    tree = {name: value for name, value in (trees.t5(True, state=True) | changes).items() if value is not None}
    source = trees.write(tmp_path / 'in', 'upcycle', tree)
    code, out, error = transfer_by_command(tmp_path, capsys, source, *options)
    assert (code, out) == (2, '')
    assert error.rpartition('upcycle: ')[2] and 'Traceback' not in error
    for word in words:
        assert word in error, error
    assert os.listdir(tmp_path) == ['in']


def test_two_clocks_do_not_fit_into_t5x(tmp_path):
    tree = trees.t5(False, state=True) | {'opt_state/count': np.int32(3)}
    source = trees.write(tmp_path / 'in', 'upcycle', tree)
    with pytest.raises(UserError, match='opt_state/count of .* is 3 but the step is 100'):
        transfer(source, tmp_path / 'out', 't5x_legacy')
    assert os.listdir(tmp_path) == ['in']


@pytest.mark.parametrize('format', ['t5x_legacy', 't5x_orbax'])
def test_a_state_that_is_not_adafactors(format, tmp_path):
    tree = trees.t5(False, state=False)
    sgd = {f'opt_state/param_states/{name[7:]}/m': value for name, value in tree.items() if name.startswith('params/')}
    source = trees.write(tmp_path / 'in', 'upcycle', tree | sgd)
    with pytest.raises(UserError, match="holds m, which is not Adafactor's state"):
        transfer(source, tmp_path / 'out', format)


def test_no_step_is_asked_for_where_it_is_needed(tmp_path):
    tree = trees.t5(False, state=False)
    del tree['step']
    source = trees.write(tmp_path / 'in', 'huggingface', tree)
    with pytest.raises(UserError, match='t5x_legacy needs the step.* --step'):
        transfer(source, tmp_path / 'out', 't5x_legacy')
    assert open_checkpoint(transfer(source, tmp_path / 'out', 't5x_legacy', step=7)).step == 7
    ours = open_checkpoint(transfer(source, tmp_path / 'ours', 'upcycle'))
    assert ours.step is None and 'step' not in ours.leaves()


def test_what_is_there_stays(tmp_path):
    source = trees.write(tmp_path / 'in', 'upcycle', trees.vit(False, state=False))
    for format, place in (
        ('upcycle', tmp_path / 'in'),
        ('vit_npz', tmp_path / 'x.npz'),
        ('huggingface', tmp_path / 'hf'),
    ):
        if format != 'upcycle':
            transfer(source, place, format)
        before = sorted(tmp_path.rglob('*'))
        with pytest.raises(UserError, match='exists already'):
            transfer(source, place, format)
        assert sorted(tmp_path.rglob('*')) == before


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    source = trees.write(tmp_path / 'in', 'upcycle', trees.vit(False, state=False))
    usage = type('Usage', (), {'free': 1000})
    monkeypatch.setattr(outputs.shutil, 'disk_usage', lambda path: usage)
    for format in ('upcycle', 'vit_npz', 'huggingface'):
        with pytest.raises(UserError, match=r'has 1 kB free, but 1.05 MB are needed'):
            transfer(source, tmp_path / 'out' / 'x.npz', format)
    assert os.listdir(tmp_path) == ['in']


def interrupted(monkeypatch, after):
    """Makes the writer fail after some parts, like a full disk."""
    write = folder_writer.FolderWriter.write
    seen = []

    def fail(self, name, region, value):
        seen.append(name)
        if len(seen) > after:
            raise writing.WriteError('no space left')
        write(self, name, region, value)

    monkeypatch.setattr(folder_writer.FolderWriter, 'write', fail)
    return write


@pytest.mark.parametrize('format', ['upcycle', 't5x_legacy', 't5x_orbax'])
def test_goes_on_where_it_was_cut_off(format, tmp_path, monkeypatch):
    tree = trees.t5(True, state=True)
    source = trees.write(tmp_path / 'in', 'upcycle', tree)
    write = interrupted(monkeypatch, 40)
    with pytest.raises(UserError, match='no space left'):
        transfer(source, tmp_path / 'out', format)
    with pytest.raises(UserError, match='interrupted'):
        open_checkpoint(tmp_path / 'out')
    asked = []
    monkeypatch.setattr(
        folder_writer.FolderWriter, 'write', lambda self, name, *rest: asked.append(name) or write(self, name, *rest)
    )
    with pytest.raises(UserError, match='holds another interrupted write .*leaves is'):
        transfer(source, tmp_path / 'out', format, dtype='bfloat16')
    path = transfer(source, tmp_path / 'out', format)
    folder = pathlib.Path(path)
    # Small arrays in T5X's index are not parts.
    kept = [name for name in tree if name != 'rng' or format == 'upcycle']
    assert len(asked) < len(kept) - (20 if format == 't5x_legacy' else 38)
    trees.assert_same(
        open_checkpoint(path),
        {name: value for name, value in tree.items() if name in kept},
    )
    assert not (folder / journal.FILE).exists() and len(list(folder.parent.iterdir())) == 1


def test_killed_leaves_nothing_that_looks_finished(tmp_path):
    rng = np.random.default_rng(0)
    tree = trees.t5(False, state=False)
    big = {'params/token_embedder/embedding': rng.normal(size=(60_000, 16)).astype('f')}
    big['params/decoder/logits_dense/kernel'] = rng.normal(size=(16, 60_000)).astype('f')
    source = trees.write(tmp_path / 'in', 'upcycle', tree | big)
    command = ['import', f'--from={source}', f'--to={tmp_path}/out']
    code = f"""
import os, signal
from upcycle import cli
from upcycle.checkpoints import folder_writer
finish = folder_writer.FolderWriter.finish
def die(self, *arguments):
    self._settle()
    os.kill(os.getpid(), signal.SIGKILL)
folder_writer.FolderWriter.finish = die
cli.main({command!r})
"""
    killed = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(UserError, match='only interrupted saves'):
        open_checkpoint(tmp_path / 'out')
    path = transfer(source, tmp_path / 'out', 'upcycle')
    trees.assert_same(open_checkpoint(path), tree | big)


def test_the_journal_waits_for_the_disk(tmp_path, monkeypatch):
    """A part is only recorded once it would survive a crash of the machine."""
    monkeypatch.setattr(journal, '_SECONDS_BETWEEN_SYNCS', 0.0)
    synced = []
    monkeypatch.setattr(journal.os, 'sync', lambda: time.sleep(0.01) or synced.append(len(written)))
    written = []
    settle = folder_writer.FolderWriter._settle_one
    monkeypatch.setattr(folder_writer.FolderWriter, '_settle_one', lambda self: written.append(1) or settle(self))
    noted = []
    let_go = folder_writer.FolderWriter._let_go

    def look(self):
        let_go(self)
        if not noted:
            noted.extend((self.folder / journal.FILE).read_text().splitlines()[1:])

    monkeypatch.setattr(folder_writer.FolderWriter, '_let_go', look)
    tree = trees.t5(False, state=False)
    path = trees.write(tmp_path / 'x', 'upcycle', tree)
    assert sorted(json.loads(line)[0] for line in noted) == sorted(tree)
    assert synced and max(synced) == len(tree)
    trees.assert_same(open_checkpoint(path), tree)


def test_a_journal_on_a_full_disk_hides_no_error(tmp_path):
    """A part that is not recorded is written again."""
    kept = journal.Journal(epath.Path(tmp_path), {'from': 'x'})
    kept.open()
    kept._file.close()
    with open('/dev/full', 'a') as full:
        kept._file = full
        kept.add(('params/x', 0))
        kept.close()
    assert journal.Journal(epath.Path(tmp_path), {'from': 'x'}).done == set()


def test_a_trained_step_with_a_changed_byte_is_refused(dense, tmp_path):
    """Orbax's files have no checksums of arrays; the record of the run has."""
    step = pathlib.Path(shutil.copytree(f'{dense}/checkpoints/4', tmp_path / '4'))
    file = max((path for path in step.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match='have changed since the save'):
        transfer(str(step), str(tmp_path / 'out'), 't5x_legacy')
    assert not (tmp_path / 'out').exists()


def test_what_is_discarded_stays_away(tmp_path):
    """Repeated, because arrays that are created in the background may race."""
    leaves = {f'params/layers_{i}/kernel': jax.ShapeDtypeStruct((4, 4), np.float32) for i in range(64)}
    for _ in range(20):
        writer = create_checkpoint(tmp_path / 'new', 'upcycle', leaves, step=1, identity={}, metadata={})
        writer.write('params/layers_0/kernel', (), np.zeros((4, 4), np.float32))
        writer.discard()
        writer.close()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('format', ['vit_npz'])
def test_a_full_disk_at_the_end_leaves_nothing(format, tmp_path, monkeypatch, capsys):
    """The format starts over, so an unfinished file is useless."""
    source = trees.write(tmp_path / 'source', 'upcycle', trees.vit(False, state=False))
    monkeypatch.setattr(os, 'fsync', lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left')))
    command = ['export', f'--from={source}', f'--to={tmp_path}/new/model.npz', f'--format={format}']
    code, _, error = call(command, capsys)
    assert code == 2 and 'cannot be written (No space left): make room' in error.splitlines()[-1], error
    assert os.listdir(tmp_path) == ['source']
