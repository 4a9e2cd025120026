"""Buckets: runs equal those on disk, checkpoints are written completely or not at all, and outages are waited for."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types

import numpy as np
import pytest
import requests
from etils import epath
from etils.epath import gpath

from tests import on_a_bucket, runs
from tests.test_cli import call
from upcycle import files
from upcycle.checkpoints import native, open_checkpoint, t5x
from upcycle.errors import Unavailable
from upcycle.metrics import MetricsLog, read_metrics
from upcycle.training import lock as locks
from upcycle.training import profile

gcsfs = pytest.importorskip('gcsfs', reason='needs gcsfs (pip install upcycle[test])')
pytest.importorskip('gcp_storage_emulator', reason='needs gcp-storage-emulator (pip install upcycle[test])')


def test_runs_in_a_bucket_are_runs_on_disk(tmp_path):
    program = [sys.executable, '-m', 'tests.on_a_bucket', str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    there = {line.split(': ')[1] for line in done.stdout.splitlines() if line.startswith('in the bucket: ')}
    assert {'config.gin', 'metrics.jsonl', 'receipt.json', 'checkpoints', 'train', 'validation'} <= there
    local, remote = (json.loads((tmp_path / name).read_text()) for name in ('local.json', 'remote.json'))
    assert local['step'] == remote['step'] == 8
    assert local['metrics'] == remote['metrics']
    # The lines of the first part remain after the second.
    rows = [(tmp_path / f'report_{name}' / 'report.csv').read_text().splitlines() for name in ('local', 'remote')]
    assert len(rows[0]) == len(rows[1]) == 3


@pytest.fixture(scope='module')
def server():
    with on_a_bucket.served() as address, on_a_bucket.clients_at(address):
        yield


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """A folder in the bucket, and a folder for temporary files that is empty before and after."""
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(temporary))
    yield epath.Path('gs://bucket') / tmp_path.name
    assert not list(temporary.iterdir())


def write_as_another_process(path, content):
    """Changes a folder without our client, whose cache would notice."""
    bucket, _, name = os.fspath(path).removeprefix('gs://').partition('/')
    address = f'{os.environ["STORAGE_EMULATOR_HOST"]}/upload/storage/v1/b/{bucket}/o'
    requests.post(address, params={'uploadType': 'media', 'name': name}, data=content, timeout=60).raise_for_status()


@pytest.mark.parametrize('look', ['exists', 'listed', 'opened'])
def test_what_another_process_writes_is_seen(look, bucket):
    """Clients cache listings: a run's config.gin, just written by process 0, was missing."""
    bucket.mkdir()
    (bucket / 'first').write_text('here')
    looks = {
        'exists': lambda path: path.exists(),
        'listed': lambda path: path.name in [each.name for each in path.parent.iterdir()],
        'opened': lambda path: bool(path.read_text()),
    }
    for name in ('second', 'folder/third'):
        path = bucket / name
        assert not path.exists() and list(bucket.iterdir()) and (bucket / 'first').exists()
        write_as_another_process(path, b'text')
        assert looks[look](path)


def unavailable(*_, **__):
    raise gcsfs.retry.HttpError({'code': 503, 'message': 'backend error'})


FORMATS = {
    'upcycle': 'shallow',
    't5x_legacy': 'shallow',
    't5x_orbax': 'shallow',
    'huggingface': 'shallow',
    'vit_npz': 'dense_vit',
}


def export(case, source, target):
    command = ['import'] if case == 'upcycle' else ['export', f'--format={case}']
    return [*command, f'--from={source}', f'--to={target}', '--optimizer_state=none']


@pytest.fixture(params=FORMATS)
def exported(request, bucket):
    """A command that writes a checkpoint of each format to the bucket, its source, and the resulting path."""
    source = request.getfixturevalue(FORMATS[request.param])
    target = bucket / ('model.npz' if request.param == 'vit_npz' else 'model')
    return export(request.param, source, target), source, target


def test_every_format_is_written(exported, bucket, capsys):
    command, source, target = exported
    code, _, error = call(command, capsys)
    assert code == 0, error
    written, read = open_checkpoint(target), open_checkpoint(source)
    params = {name for name in read.leaves() if name.startswith('params/')}
    assert written.leaves().keys() - {'step', 'rng'} == params
    for name in params:
        np.testing.assert_array_equal(written.read(name), read.read(name), err_msg=name)
    assert [path.name for path in bucket.iterdir()] == [target.name], 'no other file'
    code, _, error = call(command, capsys)
    assert code == 2 and 'exists already' in error


def test_what_cannot_be_finished_is_removed(exported, bucket, monkeypatch, capsys):
    command, _, target = exported
    sent = []

    def second(source, target):
        sent.append(target)
        (unavailable if len(sent) > 1 or target.suffix == '.npz' else send)(source, target)

    send = files.send
    monkeypatch.setattr(files, 'send', second)
    for layout in (native.NativeLayout, t5x.LegacyLayout, t5x.OrbaxLayout):
        monkeypatch.setattr(layout, 'commit', unavailable)
    code, _, error = call(command, capsys)
    assert code == 69 and error.splitlines()[-1].startswith(f'upcycle: {target} does not answer'), error
    assert 'Traceback' not in error
    assert not bucket.exists() or not list(bucket.iterdir())


@pytest.mark.parametrize(
    ('target', 'words'),
    [
        ('gs://nowhere/model', 'cannot be used'),
        ('gs://nowhere/model.npz', 'cannot be used'),
        ('gs://bucket', 'names a bucket, not a file in it'),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(target, words, bucket, shallow, capsys):
    case = 'huggingface' if target.endswith('model') else 'vit_npz'
    for command in (export(case, shallow, target), ['eval', f'--from={shallow}', f'--out={target}']):
        code, _, error = call(command, capsys)
        assert code == 2 and words in error and error.count('\n') == 1, error


@pytest.fixture
def pauses(monkeypatch):
    """Records the pauses between attempts instead of sleeping."""
    slept = []
    clock = types.SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(files, 'time', clock)
    return slept


def fails(monkeypatch, name, times, code=503):
    """Makes a method of paths fail several times; returns a counter of its calls."""
    method, calls = getattr(gpath.PosixGPath, name), []

    def call(self, *arguments, **named):
        if files.is_remote(self):
            calls.append(self)
            if len(calls) <= times:
                raise gcsfs.retry.HttpError({'code': code, 'message': 'backend error'})
        return method(self, *arguments, **named)

    monkeypatch.setattr(gpath.PosixGPath, name, call)
    return calls


def test_a_bucket_is_asked_again_with_growing_pauses(bucket, pauses, monkeypatch, capsys):
    fails(monkeypatch, 'write_text', 4)
    with files.patient():
        files.replace_text(bucket / 'receipt.json', '{}')
    assert pauses == [1, 2, 4, 8]
    said = capsys.readouterr().err
    assert said.count('warning: ') == 1 and f'{bucket}/receipt.json does not answer (backend error, 503): try' in said
    assert (bucket / 'receipt.json').read_text() == '{}'


@pytest.mark.parametrize(
    ('code', 'around', 'tries'),
    [
        (503, files.patient, 11),  # after 1, 2, 4, 8 and 16 seconds, and then every 16 up to 120
        (503, lambda: files.patient(0.0), 1),
        (503, files.asking_once, 1),
        (403, files.patient, 1),
    ],
)
def test_the_number_of_tries_is_bounded(code, around, tries, bucket, pauses, monkeypatch):
    calls = fails(monkeypatch, 'read_bytes', 1000, code)
    with pytest.raises(gcsfs.retry.HttpError), files.patient(), around():
        (bucket / 'lock.json').read_bytes()
    assert len(calls) == tries and sum(pauses) <= files.PATIENCE


def test_what_was_done_and_not_answered_is_not_done_twice(bucket, pauses, monkeypatch):
    for name in ('unlink', 'mkdir'):
        method = getattr(gpath.PosixGPath, name)

        def answers_late(self, *arguments, method=method, **named):
            method(self, *arguments, **named)
            if not pauses:
                unavailable()
            raise FileNotFoundError if method.__name__ == 'unlink' else FileExistsError

        monkeypatch.setattr(gpath.PosixGPath, name, answers_late)
    (bucket / 'x').write_text('')
    with files.patient():
        (bucket / 'x').unlink()
        assert pauses == [1]
        pauses.clear()
        (bucket / 'folder').mkdir()
    assert not (bucket / 'x').exists()


def test_a_log_waits_for_its_bucket(bucket, monkeypatch, capsys):
    with files.patient(), MetricsLog(str(bucket), None) as log:
        log.write(1, 'train', {'loss': 2.0})
        log.copy()
        with monkeypatch.context() as patch:
            calls = fails(patch, 'write_bytes', 1000)
            log.write(2, 'train', {'loss': 1.0})
            log.copy()
            assert len(calls) == 1, 'a run does not wait for its log'
            said = capsys.readouterr().err
            assert 'the log stays in' in said and 'and is sent later: ' in said and said.count('\n') == 1
        assert [line['step'] for line in read_metrics(bucket / 'metrics.jsonl')] == [1]
        log.copy()
        assert [line['step'] for line in read_metrics(bucket / 'metrics.jsonl')] == [1, 2]
    assert any(path.name.startswith('events.') for path in (bucket / 'train').iterdir())


@pytest.mark.parametrize('interrupted', [False, True])
def test_a_log_that_is_never_sent_stays(interrupted, bucket, pauses, monkeypatch, capsys):
    fails(monkeypatch, 'write_bytes', 1000)
    with (
        pytest.raises(ZeroDivisionError if interrupted else Unavailable) as caught,
        MetricsLog(str(bucket), None) as log,
    ):
        log.write(1, 'train', {'loss': 2.0})
        if interrupted:
            1 / 0  # noqa: B018
    said = capsys.readouterr().err if interrupted else str(caught.value)
    place = pathlib.Path(said.rsplit(' are in ', 1)[1].strip().rstrip('.'))
    assert [line['step'] for line in read_metrics(place / 'metrics.jsonl')] == [1]
    shutil.rmtree(place)


def test_a_lock_outlives_an_outage(bucket, monkeypatch):
    lock = locks.Lock(str(bucket))
    lock.take()
    with monkeypatch.context() as patch:
        for name in ('read_bytes', 'write_bytes'):
            fails(patch, name, 1000)
        lock.beat()
        lock.check()
    lock.beat()
    lock.check()
    assert json.loads((bucket / locks.NAME).read_bytes())['beat'] == 2
    lock.release()
    assert not (bucket / locks.NAME).exists()


def test_a_profile_is_sent(bucket, monkeypatch):
    written = []
    monkeypatch.setattr(profile.jax.profiler, 'start_trace', lambda folder: written.append(pathlib.Path(folder)))
    monkeypatch.setattr(profile.jax.profiler, 'stop_trace', lambda: (written[0] / 'x.xplane.pb').write_bytes(b'trace'))
    trace = profile.Profile(range(2, 3), str(bucket / 'profile'))
    for step in (1, 2):
        trace.before(step)
        trace.after(step, ())
    assert (bucket / 'profile' / 'x.xplane.pb').read_bytes() == b'trace'


def test_a_run_outlives_outages(bucket, shallow):
    """The result is the same as without failures."""
    with on_a_bucket.outages() as failed:
        runs.train('dense', bucket, 4, **runs.ONE_LAYER)
    assert {name for name, _ in failed} >= {'write_text', 'read_bytes', 'mkdir', 'exists'}
    ours, theirs = open_checkpoint(bucket), open_checkpoint(shallow)
    for name in theirs.leaves():
        np.testing.assert_array_equal(ours.read(name), theirs.read(name), err_msg=name)
    lines = [read_metrics(epath.Path(run) / 'metrics.jsonl') for run in (bucket, shallow)]
    assert [(line['step'], line['loss']) for line in lines[0]] == [(line['step'], line['loss']) for line in lines[1]]


def test_a_step_that_cannot_be_saved_says_which(bucket, pauses, monkeypatch):
    with native.CheckpointManager(bucket) as manager:
        monkeypatch.setattr(manager._manager, 'save', unavailable)
        with pytest.raises(Unavailable, match=f'step 2 cannot be saved: {bucket}/checkpoints does not answer'):
            manager.save(2, {'params': {'kernel': np.ones(3, np.float32)}}, {}, {})
