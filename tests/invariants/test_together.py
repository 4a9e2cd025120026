"""What several processes do together apart from training: end when one cannot go on, and hash the files of a step."""

import contextlib
import io
import json
import os
import shutil
import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from tests.invariants.devices import processes, start_together
from tests.invariants.test_processes import two_commands
from upcycle import casts, hosts, partitioning
from upcycle.checkpoints import hashing, integrity
from upcycle.errors import Unavailable, UserError, status_of

SILENCE = 'gs://bucket/run does not answer (backend error, 503): check the network, and repeat the command.'


def end(failing, done):
    """What each process did that is not told to fail: the statuses it ended with, and what it said."""
    ended, over, said = [], threading.Event(), io.StringIO()

    def note(status):
        ended.append(status)
        over.set()

    with contextlib.redirect_stderr(said):
        together = hosts.Together(hosts.store(), jax.process_index(), 2, note, grace=0.1 if len(failing) == 1 else 60.0)
        if jax.process_index() in failing:
            together.fail(69, SILENCE)
        elif done:
            together.part()
        else:
            over.wait()
        together.close()
    integrity.by_process_0(lambda: 0, '')
    for key in (together._FAILED, together._DONE, together._ENDED):
        hosts.store().key_value_delete(key)
    integrity.by_process_0(lambda: 0, '')
    return ended, said.getvalue()


@pytest.mark.parametrize('done', [False, True], ids=['it waits', 'it has done all'])
@pytest.mark.parametrize('failing', [[0], [1]])
def test_each_process_ends_with_the_one_that_cannot_go_on(failing, done):
    found = processes(2, 4).call(end, failing, done)
    assert found[failing[0]] == ([], '')
    assert found[1 - failing[0]] == ([69], f'upcycle: process {failing[0]} ended the run: {SILENCE}\n')


@pytest.mark.parametrize('failing', [[0, 1], []], ids=['fail', 'have done all'])
def test_processes_that_end_together_do_so_by_themselves(failing):
    assert processes(2, 4).call(end, failing, done=True) == [([], ''), ([], '')]


ERRORS = {
    'a mistake': (lambda: UserError('x'), 2),
    'silence': (lambda: Unavailable('x'), 69),
    'silence of a client': (lambda: ValueError('UNAVAILABLE: Error reading "gs://bucket/run/0": CURL error'), 69),
    'anything else': (lambda: KeyError('x'), 1),
}


def look(case):
    def raises():
        raise ERRORS[case][0]()

    try:
        integrity.by_process_0(raises, "MODEL_DIR = 'gs://bucket/run' is in use: process 0 says by whom.")
    except Exception as error:
        return type(error), status_of(error)


@pytest.mark.parametrize('case', ERRORS)
def test_what_ends_process_0_releases_the_others(case):
    make, status = ERRORS[case]
    found = processes(2, 4).call(look, case)
    assert found[0][0] is type(make())
    assert found[1][1] == status


def hash_step(folder, what, deaf):
    """What process 0 finds of a step's files, and the names of those that this process has hashed."""
    found, hashed = [], []
    describe, lookup, patience = hashing._describe, hosts.lookup, hashing._LONGER

    def note(file):
        hashed.append(os.path.relpath(file, folder))
        return describe(file)

    hashing.SHARED_BYTES, hashing._describe = 0, note
    if deaf:
        hashing._LONGER = 0.0
        hosts.lookup = lambda store, key: None if key.endswith('/answer') else lookup(store, key)
    # Process 0 may ask only once the other one takes notes.
    multihost_utils.sync_global_devices('hash_step')
    try:
        integrity.by_process_0(lambda: found.append(getattr(integrity, what)(integrity.epath.Path(folder))) or 0, '')
    finally:
        hashing.SHARED_BYTES, hashing._describe, hosts.lookup, hashing._LONGER = 256 << 20, describe, lookup, patience
    return found, hashed


@pytest.fixture
def step(tmp_path):
    """Files of several sizes, the largest of which is half of all."""
    folder = tmp_path / '7'
    rng = np.random.default_rng(0)
    for name, size in {'state/d/0': 300_000, 'state/d/1': 150_000, 'state/d/2': 150_000, 'data/metadata': 0}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.bytes(size))
    return folder


def test_every_process_hashes_its_share_and_the_record_is_that_of_one(step, tmp_path):
    alone = shutil.copytree(step, tmp_path / 'alone')
    integrity.write_record(integrity.epath.Path(alone))
    (_, first), (_, second) = processes(2, 4).call(hash_step, str(step), 'write_record', deaf=False)
    assert (step / integrity.RECORD).read_bytes() == (alone / integrity.RECORD).read_bytes()
    assert sorted(first + second) == sorted(json.loads((step / integrity.RECORD).read_text())['files'])
    shares = [sum((step / name).stat().st_size for name in names) for names in (first, second)]
    assert shares == [300_000, 300_000]


@pytest.mark.parametrize('name', ['state/d/0', 'state/d/1'])
@pytest.mark.parametrize(
    'damage', [lambda file: file.unlink(), lambda file: file.write_bytes(b'x'), lambda file: os.truncate(file, 0)]
)
def test_damage_is_found_whoever_hashes(damage, name, step):
    integrity.write_record(integrity.epath.Path(step))
    damage(step / name)
    (found, first), (_, second) = processes(2, 4).call(hash_step, str(step), 'damage', deaf=False)
    assert found == [integrity.damage(integrity.epath.Path(step))] and name in found[0]
    assert first and second


def test_what_another_process_does_not_answer_is_hashed_by_process_0(step):
    (_, first), _ = processes(2, 4).call(hash_step, str(step), 'write_record', deaf=True)
    assert len(first) == 4 and not integrity.damage(integrity.epath.Path(step))


def test_a_process_that_has_missed_a_question_answers_the_next(step):
    processes(2, 4).call(hash_step, str(step), 'write_record', deaf=True)
    (_, first), (_, second) = processes(2, 4).call(hash_step, str(step), 'write_record', deaf=False)
    assert sorted(first + second) == ['data/metadata', 'state/d/0', 'state/d/1', 'state/d/2'] and second


def look_at(folder, steps):
    """Why the step that this process has found is refused."""
    try:
        integrity.require_whole(os.path.join(folder, steps[jax.process_index()]))
    except UserError as error:
        return str(error)


def test_processes_that_find_different_steps_read_none(tmp_path):
    """The newest step of a run that saves one while they start."""
    found = processes(2, 4).call(look_at, str(tmp_path), ('4', '6'))
    assert found[0] == found[1] and f'different steps in {tmp_path} (4, 6)' in found[0]
    assert processes(2, 4).call(look_at, str(tmp_path), ('4', '4')) == [None, None]


def cast_alone(process):
    """What one process makes of its part of a leaf, in whose last row is a number that float16 cannot hold."""
    mesh = partitioning.make_mesh((8, 1, 1), None)
    rows = np.zeros((8, 3), np.float32)
    rows[-1, 1], rows[0] = 1e6, 1.0
    leaf = partitioning.put_whole(rows, partitioning.batch_sharding(mesh))
    if jax.process_index() != process:
        return None
    try:
        made = casts.cast('params/x', leaf, 'float16')
    except UserError as error:
        return str(error)
    return made.dtype.name, [np.asarray(shard.data).tolist() for shard in made.addressable_shards][0]


@pytest.mark.parametrize('process', [0, 1])
def test_a_process_casts_its_part_of_a_leaf_without_the_others(process):
    """Which may not come, where one of them could not read the leaf."""
    found = processes(2, 4).call(cast_alone, process)
    assert found[1 - process] is None
    if process == 0:
        assert found[0] == ('float16', [[1.0, 1.0, 1.0]])
    else:
        assert found[1].startswith('params/x (the part of process 1) holds 1 of 12 numbers that float16 cannot hold')


def test_files_are_dealt_out_by_size():
    sizes = {f'{n:03}': size for n, size in enumerate(np.random.default_rng(0).integers(0, 1000, 200).tolist())}
    shares = hashing.deal(sizes, 7)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    totals = [sum(sizes[name] for name in share) for share in shares]
    assert max(totals) - min(totals) <= max(sizes.values())


FAILS = f"""
import sys

from upcycle import cli, metrics
from upcycle.errors import Unavailable

def fails(self, *_):
    raise Unavailable({SILENCE!r})

setattr(metrics.MetricsLog, sys.argv.pop(1), fails)
cli.main()
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize('method', ['write', 'close'])
def test_two_commands_end_with_one_status_and_one_sentence(method, shallow, tmp_path):
    """Process 0 alone has a log; the other one is in the next step when it is written, and at its end when it is closed."""
    commands = two_commands('upcycle', tmp_path / 'run', 10, shallow)
    running = start_together([['-c', FAILS, method, *command[2:]] for command in commands], devices=4)
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [69, 69], outputs
    assert outputs[0].splitlines()[-1] == f'upcycle: {SILENCE}'
    assert outputs[1].splitlines()[-1] == f'upcycle: process 0 ended the run: {SILENCE}'
