"""Runs of several processes, and checkpoints that move between meshes: one program, eight devices, however they are dealt."""

import contextlib
import signal
import time

import jax
import numpy as np
import pytest

from tests import on_a_bucket, runs
from tests.invariants.devices import free_port, on_devices, processes, start_together
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

# The dense checkpoint and more bindings of each kind: of random tokens, one layer a stack; of text, with dense layers; and of a
# decoder-only model, packed text through grain, at a rate that lets a run be made longer.
OF_KIND = {
    'upcycle': ('shallow', runs.ONE_SPARSE_LAYER),
    'text upcycle': ('dense', {}),
    'llm text upcycle': ('dense_llm', {'LEARNING_RATE_FACTORS': 'constant * linear_warmup'}),
}


def more(kind, start):
    return {'INITIAL_CHECKPOINT_PATH': start, **OF_KIND[kind][1], **SETTINGS}


def train(kind, model_dir, steps, start):
    """Called in whichever process, or in all of several."""
    runs.train(kind, model_dir, steps, **more(kind, start))


def two_commands(kind, model_dir, steps, start, **bindings):
    """`upcycle train` of each of two processes."""
    bindings = runs.bindings(kind, model_dir, steps, **more(kind, start), **bindings)
    files = [f'--gin_file={file}' for file in runs.FILES[kind]]
    run = ['-m', 'upcycle', 'train', *files, *(f'--gin.{name}={value}' for name, value in bindings.items())]
    hosts = (f'--coordinator_address=localhost:{free_port()}', '--process_count=2')
    return [[*run, *hosts, f'--process_index={i}'] for i in range(2)]


@pytest.fixture(
    scope='module',
    params=[
        'upcycle',
        *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ('text upcycle', 'llm text upcycle')),
    ],
)
def kind(request):
    """Those of text take longer to start."""
    return request.param


@pytest.fixture(scope='module')
def start(kind, request):
    """The dense checkpoint."""
    return request.getfixturevalue(OF_KIND[kind][0])


@pytest.fixture(scope='module')
def whole(kind, start, tmp_path_factory):
    """Upcycling, steps 5 to 10, by one process with eight devices."""
    path = tmp_path_factory.mktemp('whole') / 'run'
    on_devices(8, train, kind, path, 10, start)
    return read_metrics(path / 'metrics.jsonl')


def assert_same(lines, whole):
    assert [(line['step'], line['split']) for line in lines] == [(line['step'], line['split']) for line in whole]
    for line, expected in zip(lines, whole, strict=True):
        for name in ('loss', 'accuracy', 'gradient_norm', 'experts/router_entropy', 'flops'):
            if name in expected:
                np.testing.assert_allclose(line[name], expected[name], rtol=1e-4, err_msg=f'{line["step"]} {name}')


def test_two_processes_upcycle_and_train_as_one(kind, start, whole, tmp_path):
    """Though they are stopped on the way: one of them is told, both save the same step, and go on from there."""
    path = tmp_path / 'run'
    log = path / 'metrics.jsonl'
    running = start_together(two_commands(kind, path, 10**6, start, CHECKPOINT_PERIOD=10**6), devices=4)
    while all(process.poll() is None for process in running) and not read_metrics(log):
        time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [PREEMPTED] * 2, outputs
    step = read_metrics(log)[-1]['step']
    assert all(f'stopped on request and saved step {step};' in output for output in outputs)
    assert open_checkpoint(path).step == step
    processes(2, 4).call(train, kind, path, max(step + 2, 10), start)
    lines = read_metrics(log)
    trained = [line['step'] for line in lines if line['split'] == 'train']
    assert trained == list(range(5, max(step + 2, 10) + 1))
    assert_same(lines[: len(whole)], whole)
    assert (path / 'receipt.json').exists()


def test_a_checkpoint_moves_from_eight_devices_to_one_to_two_processes(kind, start, whole, tmp_path):
    path = tmp_path / 'run'
    on_devices(8, train, kind, path, 6, start)
    train(kind, path, 8, start)
    processes(2, 4).call(train, kind, path, 10, start)
    assert_same(read_metrics(path / 'metrics.jsonl'), whole)


def train_in_a_bucket(kind, address, model_dir, steps, start):
    """In each of two processes: the outages are those of process 0. Returns the log, and how many requests failed."""
    with on_a_bucket.clients_at(address):
        with on_a_bucket.outages() if jax.process_index() == 0 else contextlib.nullcontext(()) as failed:
            train(kind, model_dir, steps, start)
        return read_metrics(f'{model_dir}/metrics.jsonl'), len(failed)


def test_an_outage_of_process_0_s_bucket_ends_no_process(kind, start, whole):
    for client in ('gcsfs', 'gcp_storage_emulator'):
        pytest.importorskip(client)
    with on_a_bucket.served() as address:
        found = processes(2, 4).call(train_in_a_bucket, kind, address, 'gs://bucket/run', 8, start)
    assert found[0][1] > 10 and found[1][1] == 0
    assert found[0][0] == found[1][0]
    assert_same(found[0][0], [line for line in whole if line['step'] <= 8])


@pytest.mark.exhaustive
def test_two_commands_run_to_their_end(kind, start, whole, tmp_path):
    """`upcycle train` of each process, from its start to its exit status 0."""
    path = tmp_path / 'run'
    running = start_together(two_commands(kind, path, 10, start), devices=4)
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert_same(read_metrics(path / 'metrics.jsonl'), whole)
