"""Runs of several processes, and checkpoints that move between meshes: one program, eight devices, however they are dealt."""

import socket

import numpy as np
import pytest

from tests import runs
from tests.invariants.devices import run, run_together
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


def command(kind, model_dir, steps, dense, *options):
    bindings = runs.bindings(kind, model_dir, steps, INITIAL_CHECKPOINT_PATH=dense, **SETTINGS)
    files = [f'--gin_file={file}' for file in runs.FILES[kind]]
    return ['-m', 'upcycle', 'train', *files, *(f'--gin.{name}={value}' for name, value in bindings.items()), *options]


def free_port():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def two_processes(*arguments):
    where = f'--coordinator_address=localhost:{free_port()}'
    run_together([command(*arguments, where, '--process_count=2', f'--process_index={i}') for i in range(2)], devices=4)


@pytest.fixture(scope='module')
def whole(dense, tmp_path_factory):
    """Upcycling, steps 5 to 10, by one process with eight devices."""
    path = tmp_path_factory.mktemp('whole') / 'run'
    run(command('upcycle', path, 10, dense), devices=8)
    return read_metrics(path / 'metrics.jsonl')


def assert_same(path, whole):
    lines = read_metrics(path / 'metrics.jsonl')
    assert [(line['step'], line['split']) for line in lines] == [(line['step'], line['split']) for line in whole]
    for line, expected in zip(lines, whole, strict=True):
        for name in ('loss', 'accuracy', 'gradient_norm', 'experts/router_entropy', 'flops'):
            if name in expected:
                np.testing.assert_allclose(line[name], expected[name], rtol=1e-4, err_msg=f'{line["step"]} {name}')


def test_two_processes_upcycle_and_train_as_one(dense, whole, tmp_path):
    path = tmp_path / 'run'
    two_processes('upcycle', path, 10, dense)
    assert_same(path, whole)
    assert (path / 'receipt.json').exists()


def test_a_checkpoint_moves_from_eight_devices_to_one_to_two_processes(dense, whole, tmp_path):
    path = tmp_path / 'run'
    run(command('upcycle', path, 6, dense), devices=8)
    run(command('upcycle', path, 8, dense), devices=1)
    two_processes('upcycle', path, 10, dense)
    assert_same(path, whole)
