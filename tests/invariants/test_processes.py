"""Runs of several processes, and checkpoints that move between meshes: one program, eight devices, however they are dealt."""

import signal
import time

import numpy as np
import pytest

from tests import runs
from tests.invariants.devices import free_port, run, run_together, start_together
from upcycle.checkpoints import open_checkpoint
from upcycle.errors import PREEMPTED
from upcycle.metrics import read_metrics

# A small rate: fresh Adafactor turns rounding into whole steps, and at the tiny model's own rate they grow tenfold each.
SETTINGS = {
    'NUM_EXPERTS': 8,
    'BASE_LEARNING_RATE': 0.01,
    'BATCH_SIZE': 8,
    'GROUPS_MULTIPLE_OF': 8,
    'LOG_PERIOD': 1,
    'EVAL_PERIOD': 2,
}


def command(kind, model_dir, steps, dense, *options, **more):
    bindings = runs.bindings(kind, model_dir, steps, INITIAL_CHECKPOINT_PATH=dense, **SETTINGS, **more)
    files = [f'--gin_file={file}' for file in runs.FILES[kind]]
    return ['-m', 'upcycle', 'train', *files, *(f'--gin.{name}={value}' for name, value in bindings.items()), *options]


def two(*arguments, **more):
    where = f'--coordinator_address=localhost:{free_port()}'
    return [command(*arguments, where, '--process_count=2', f'--process_index={i}', **more) for i in range(2)]


def two_processes(*arguments):
    run_together(two(*arguments), devices=4)


@pytest.fixture(scope='module')
def whole(dense, tmp_path_factory):
    """Upcycling, steps 5 to 10, by one process with eight devices."""
    path = tmp_path_factory.mktemp('whole') / 'run'
    run(command('text upcycle', path, 10, dense), devices=8)
    return read_metrics(path / 'metrics.jsonl')


def assert_same(lines, whole):
    assert [(line['step'], line['split']) for line in lines] == [(line['step'], line['split']) for line in whole]
    for line, expected in zip(lines, whole, strict=True):
        for name in ('loss', 'accuracy', 'gradient_norm', 'experts/router_entropy', 'flops'):
            if name in expected:
                np.testing.assert_allclose(line[name], expected[name], rtol=1e-4, err_msg=f'{line["step"]} {name}')


def test_two_processes_upcycle_and_train_as_one(dense, whole, tmp_path):
    """Though they are stopped on the way: one of them is told, both save the same step, and go on from there."""
    path = tmp_path / 'run'
    log = path / 'metrics.jsonl'
    endless = ('text upcycle', path, 10**6, dense)
    processes = start_together(two(*endless, CHECKPOINT_PERIOD=10**6), devices=4)
    while all(process.poll() is None for process in processes) and not read_metrics(log):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [PREEMPTED] * 2, outputs
    step = read_metrics(log)[-1]['step']
    assert all(f'asked to stop, and saved step {step};' in output for output in outputs)
    assert open_checkpoint(path).step == step
    two_processes('text upcycle', path, max(step + 2, 10), dense)
    lines = read_metrics(log)
    trained = [line['step'] for line in lines if line['split'] == 'train']
    assert trained == list(range(5, max(step + 2, 10) + 1))
    assert_same(lines[: len(whole)], whole)
    assert (path / 'receipt.json').exists()


def test_a_checkpoint_moves_from_eight_devices_to_one_to_two_processes(dense, whole, tmp_path):
    path = tmp_path / 'run'
    run(command('text upcycle', path, 6, dense), devices=8)
    run(command('text upcycle', path, 8, dense), devices=1)
    two_processes('text upcycle', path, 10, dense)
    assert_same(read_metrics(path / 'metrics.jsonl'), whole)
