"""The lock of a run's folder: who may take it over, and when. Clocks and identities are simulated, except in one test."""

import json
import os
import subprocess
import sys
import threading

import pytest

from tests import runs
from upcycle.errors import UserError
from upcycle.metrics import read_metrics
from upcycle.training import lock as locks
from upcycle.training import loop
from upcycle.training.lock import NAME, PATIENCE, Lock

# The id of a process that has ended; no other process has it.
ENDED = 2**22 + 1


class Clock:
    """A clock that moves only in `sleep`, during which other holders can act."""

    def __init__(self, meanwhile=lambda: None):
        self.now, self.meanwhile = 0.0, meanwhile

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile()


def lock(folder, clock=None, **other):
    clock = clock or Clock()
    return Lock(str(folder), me={**locks.this_process(), **other}, clock=clock, sleep=clock.sleep)


def holder(folder):
    return json.loads((folder / NAME).read_bytes())


def test_taken_and_released(tmp_path):
    ours = lock(tmp_path)
    ours.take()
    assert holder(tmp_path)['process'] == os.getpid()
    ours.check()
    ours.release()
    assert not list(tmp_path.iterdir())
    lock(tmp_path).take()


@pytest.mark.parametrize(
    'dead',
    [
        {'process': ENDED},
        {'started': '1'},  # another process has its id now
    ],
    ids=str,
)
def test_the_lock_of_a_dead_holder_on_this_machine_is_taken_over_at_once(dead, tmp_path, capsys):
    lock(tmp_path, **dead).take()
    clock = Clock()
    lock(tmp_path, clock).take()
    assert clock.now == 0 and holder(tmp_path)['started'] == locks.this_process()['started']
    assert not capsys.readouterr().err


def test_a_zombie_is_dead(tmp_path):
    """As in a container whose first process does not reap its children."""
    child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    me = {'process': child.pid, 'started': locks._start_of(child.pid)}
    lock(tmp_path, **me).take()
    assert not locks.is_dead(holder(tmp_path))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert locks.is_dead(holder(tmp_path))
    child.wait()


UNKNOWN = {
    'another boot': {'process': ENDED, 'boot': 'another'},
    'another PID namespace': {'process': ENDED, 'pid_namespace': 'pid:[1]'},
    'a system that does not say': {'process': ENDED, 'boot': None, 'pid_namespace': None},
    'here, and stopped': {},
    'a text that was cut off': b'{"host": "a',
    'nothing': b'',
    'more than a lock holds': b'{"process": 1}' + b' ' * 5000,
    'deeper than a lock is': b'[' * 100_000,
}


@pytest.mark.parametrize('kind', UNKNOWN)
def test_any_other_lock_is_taken_over_after_its_heartbeat_stops(kind, tmp_path, capsys):
    if isinstance(UNKNOWN[kind], bytes):
        (tmp_path / NAME).write_bytes(UNKNOWN[kind])
    else:
        lock(tmp_path, **UNKNOWN[kind]).take()
    clock, calls = Clock(), 1
    ours = lock(tmp_path, clock)
    while not ours.take(10):
        calls += 1
    assert PATIENCE <= clock.now < PATIENCE + 1 and calls > 5
    assert holder(tmp_path)['process'] == os.getpid()
    ours.check()
    assert 'may be in use: waiting 60 s for a sign of life of' in capsys.readouterr().err


NO_FILE = {
    'a folder': lambda path: path.mkdir(),
    'a link to nothing': lambda path: path.symlink_to('/nowhere/at/all'),
    'a link to itself': lambda path: path.symlink_to(path),
    'a pipe': os.mkfifo,
}


@pytest.mark.parametrize('kind', NO_FILE)
def test_something_other_than_a_file_is_refused_and_kept(kind, tmp_path):
    NO_FILE[kind](tmp_path / NAME)
    with pytest.raises(UserError, match=f'{NAME} is not a file, but a run writes a file there'):
        lock(tmp_path).take(1)
    assert os.path.lexists(tmp_path / NAME)


def test_a_link_to_a_lock_is_a_lock(tmp_path):
    lock(tmp_path, process=ENDED).take()
    (tmp_path / NAME).rename(tmp_path / 'elsewhere.json')
    (tmp_path / NAME).symlink_to('elsewhere.json')
    ours = lock(tmp_path)
    assert ours.take(1)
    ours.check()


@pytest.mark.parametrize('kind', ['another boot', 'here, and stopped'])
def test_the_message_names_a_living_holder(kind, tmp_path):
    """The holder's clock may differ from ours."""
    theirs = lock(tmp_path, host='over-there', **UNKNOWN[kind])
    theirs.take()
    clock = Clock()
    clock.meanwhile = lambda: theirs.beat() if clock.now > 59 else None
    with pytest.raises(UserError, match=r'in use: process \d+ on over-there \(since 20.* UTC\) trains there. Wait'):
        lock(tmp_path, clock).take()
    theirs.check()


def test_a_holder_notices_that_it_lost_the_lock(tmp_path):
    theirs = lock(tmp_path, host='a')
    theirs.take()
    ours = lock(tmp_path, host='b')
    ours.take()
    with pytest.raises(
        UserError, match=r'no longer held by this process, which stops here: process \d+ on b .*took it'
    ):
        theirs.check()
    again = lock(tmp_path, host='c')
    again.take()
    ours.beat()
    with pytest.raises(UserError, match='on c .*took it over'):
        ours.check(look=False)
    ours.release()  # no longer its own
    assert holder(tmp_path)['host'] == 'c'
    again.check()
    os.unlink(tmp_path / NAME)
    with pytest.raises(UserError, match=r'lock.json was removed'):
        again.check()


def test_one_of_several_takers_wins(tmp_path):
    """All see the same dead holder and take its lock at the same time."""
    for _ in range(20):
        lock(tmp_path, process=ENDED).take()
        start, outcomes, refused = threading.Barrier(4), [], []

        def take(number, start=start, outcomes=outcomes, refused=refused):
            mine = Lock(str(tmp_path), {**locks.this_process(), 'host': str(number)}, lambda: 0.0, lambda seconds: None)
            start.wait()
            try:
                mine.take()
                outcomes.append(str(number))
                while len(outcomes) + len(refused) < 4:
                    mine.beat()
            except UserError:
                refused.append(number)

        threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes == [holder(tmp_path)['host']]
        os.unlink(tmp_path / NAME)


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(file, text, offset):
        if offset:
            raise OSError(28, 'No space left on device')
        return 3

    monkeypatch.setattr(os, 'pwrite', full)
    with pytest.raises(UserError, match='No space left'), locks.held(str(tmp_path / 'run')):
        pass
    assert not list((tmp_path / 'run').iterdir())


@pytest.mark.parametrize('end', [KeyboardInterrupt, UserError, None])
def test_released_however_it_ends(end, tmp_path):
    try:
        with locks.held(str(tmp_path)) as still_ours:
            still_ours(True)
            assert (tmp_path / NAME).exists()
            if end is not None:
                raise end
    except (KeyboardInterrupt, UserError):
        pass
    assert not (tmp_path / NAME).exists()


HOLD = """
import sys
from upcycle.training import lock
lock._LocalFile.beat = 0.05
with lock.held(sys.argv[1]):
    print('held', flush=True)
    sys.stdin.read()
"""


def test_two_processes(tmp_path, monkeypatch):
    """The second process is refused while the first is alive, and takes over after it was killed."""
    monkeypatch.setattr(locks._LocalFile, 'beat', 0.05)
    with subprocess.Popen(
        [sys.executable, '-c', HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == 'held\n'
        with pytest.raises(UserError, match=f'in use: process {first.pid} on '), locks.held(str(tmp_path)):
            pass
        first.kill()
    with locks.held(str(tmp_path)):
        assert holder(tmp_path)['process'] == os.getpid()


@pytest.mark.parametrize('when', ['log', 'save'])
def test_a_run_whose_folder_was_taken_over_stops(when, tmp_path, monkeypatch):
    """A run that was suspended meanwhile: it no longer logs or saves, and leaves the other run's lock."""
    add, steps = loop.Window.add, []

    def taken_over(self, metrics):
        add(self, metrics)
        steps.append(1)
        if len(steps) == 2:
            other = lock(tmp_path, host='over-there')
            (tmp_path / NAME).write_bytes(other._text())
            if when == 'log':
                threads = {thread.name: thread for thread in threading.enumerate()}
                threads['lock'].join()  # ends when its heartbeat finds another lock

    monkeypatch.setattr(locks._LocalFile, 'beat', 0.01)
    monkeypatch.setattr(loop.Window, 'add', taken_over)
    with pytest.raises(UserError, match=r'no longer held by this process.* on over-there .*took it over'):
        runs.train('dense', tmp_path, 4, LOG_PERIOD=2 if when == 'log' else 100, EVAL_PERIOD=100)
    assert holder(tmp_path)['host'] == 'over-there'
    assert [record['step'] for record in read_metrics(tmp_path / 'metrics.jsonl')] == [0]
    assert not list((tmp_path / 'checkpoints').iterdir())
