"""The training loop: exact resume, the four kinds of run, the ledger, and refusals."""

import concurrent.futures
import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest

from tests import runs
from upcycle.checkpoints import open_checkpoint
from upcycle.data import WHOLE
from upcycle.data.synthetic import SyntheticText
from upcycle.errors import Preempted, UserError
from upcycle.log_lines import depends_on_speed
from upcycle.metrics import read_metrics
from upcycle.training import loop
from upcycle.training.start import Start


def lines_of(model_dir):
    lines = read_metrics(os.path.join(model_dir, 'metrics.jsonl'))
    # Except times and rates.
    return [{name: value for name, value in line.items() if not depends_on_speed(name)} for line in lines]


def leaves_of(model_dir):
    reader = open_checkpoint(str(model_dir))
    return {name: np.asarray(reader.read(name)) for name in reader.leaves()}


def killed_at(monkeypatch, step):
    """Makes the next run end after that many steps, as if the machine had failed."""
    taken = []
    add = loop.Window.add

    def add_or_die(self, metrics):
        taken.append(1)
        if len(taken) == step:
            raise KeyboardInterrupt
        add(self, metrics)

    monkeypatch.setattr(loop.Window, 'add', add_or_die)


@pytest.mark.parametrize(
    'kind',
    [
        'text upcycle',
        *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ('dense', 'vit upcycle', 'llm text upcycle')),
    ],
)
def test_resume_is_exact(kind, tmp_path, monkeypatch, request):
    """A run killed between two checkpoints and within a log window gives the same lines and the same state, bit for bit."""
    first, more = 0, {'DROPOUT_RATE': 0.1}
    if kind == 'text upcycle':
        first, more = 4, more | {'INITIAL_CHECKPOINT_PATH': request.getfixturevalue('shallow'), **runs.ONE_SPARSE_LAYER}
    elif kind == 'vit upcycle':
        first, more = 4, more | {'INITIAL_CHECKPOINT_PATH': request.getfixturevalue('dense_vit')}
    elif kind == 'llm text upcycle':
        first, more = 4, more | {'INITIAL_CHECKPOINT_PATH': request.getfixturevalue('dense_llm'), 'WARMUP_STEPS': 2}
    runs.train(kind, tmp_path / 'whole', first + 7, **more)
    with monkeypatch.context() as patch:
        killed_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            runs.train(kind, tmp_path / 'cut', first + 7, **more)
    runs.train(kind, tmp_path / 'cut', first + 7, **more)
    assert lines_of(tmp_path / 'cut') == lines_of(tmp_path / 'whole')
    whole, cut = leaves_of(tmp_path / 'whole'), leaves_of(tmp_path / 'cut')
    assert whole.keys() == cut.keys()
    for name, leaf in whole.items():
        np.testing.assert_array_equal(cut[name], leaf, err_msg=name)


STOPPED = {'CHECKPOINT_PERIOD': 100, 'EVAL_PERIOD': 3, 'LOG_PERIOD': 2}


@pytest.fixture(scope='module')
def never_stopped(dense, tmp_path_factory):
    """Steps 5 to 8 of an upcycled run."""
    path = tmp_path_factory.mktemp('never_stopped')
    runs.train('upcycle', path, 8, INITIAL_CHECKPOINT_PATH=dense, **STOPPED)
    return path


@pytest.mark.parametrize('step', [6, 8])
def test_a_stop_request_saves_at_once_and_the_resumed_run_is_exact(step, tmp_path, monkeypatch, dense, never_stopped):
    """SIGTERM between checkpoints, when an evaluation is due, and at the last step, which ends normally."""
    first, more = 4, {'INITIAL_CHECKPOINT_PATH': dense, **STOPPED}
    handler = signal.getsignal(signal.SIGTERM)
    add = loop.Window.add
    taken = []

    def add_and_signal(self, metrics):
        add(self, metrics)
        taken.append(1)
        if first + len(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Window, 'add', add_and_signal)
        if step == first + 4:
            runs.train('upcycle', tmp_path / 'cut', first + 4, **more)
        else:
            with pytest.raises(Preempted, match=f'saved step {step}'):
                runs.train('upcycle', tmp_path / 'cut', first + 4, **more)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert len(taken) == step - first
    assert open_checkpoint(str(tmp_path / 'cut')).step == step
    runs.train('upcycle', tmp_path / 'cut', first + 4, **more)
    assert lines_of(tmp_path / 'cut') == lines_of(never_stopped)
    whole, cut = leaves_of(never_stopped), leaves_of(tmp_path / 'cut')
    for name, leaf in whole.items():
        np.testing.assert_array_equal(cut[name], leaf, err_msg=name)


def test_a_finished_run_takes_no_steps(dense, monkeypatch):
    before = lines_of(dense)
    monkeypatch.setattr(loop, 'lower_step', None)
    state = runs.train('dense', dense, 4)
    assert int(state.step) == 4
    assert lines_of(dense) == before


def test_dense_continuation_equals_the_longer_dense_run(tmp_path, dense):
    """A run that restores the dense state takes the same steps as the dense run."""
    runs.train('dense', tmp_path / 'longer', 6)
    runs.train('continue', tmp_path / 'branch', 6, INITIAL_CHECKPOINT_PATH=dense)
    longer, branch = leaves_of(tmp_path / 'longer'), leaves_of(tmp_path / 'branch')
    for name, leaf in longer.items():
        np.testing.assert_array_equal(branch[name], leaf, err_msg=name)


def test_a_stream_is_read_from_its_beginning_in_an_order_of_the_first_step(tmp_path, dense, monkeypatch):
    """A dense run of a million steps is continued without reading a million batches; random access reads on."""
    starts = []
    batches = SyntheticText.batches

    def watched(self, start=0, share=WHOLE):
        if self.num_batches is None:  # training data
            starts.append((self.seed, start))
        return batches(self, start, share)

    monkeypatch.setattr(SyntheticText, 'batches', watched)
    runs.train('continue', tmp_path / 'on', 5, INITIAL_CHECKPOINT_PATH=dense)
    assert {*starts} == {(0, 0), (0, 4)}
    kept = {'INITIAL_CHECKPOINT_PATH': dense, 'CHECKPOINT_KEEP': 2}
    monkeypatch.setattr(SyntheticText, 'streamed', True, raising=False)
    starts.clear()
    runs.train('continue', tmp_path / 'streamed', 7, **kept)
    runs.train('dense', tmp_path / 'scratch', 2)
    (seed,) = {seed for seed, _ in starts} - {0}
    assert (seed, 0) in starts and {start for _, start in starts} == {0}
    whole = leaves_of(tmp_path / 'streamed')
    # A resumed run reads the same stream up to its position.
    shutil.rmtree(tmp_path / 'streamed' / 'checkpoints' / '7')
    starts.clear()
    runs.train('continue', tmp_path / 'streamed', 7, **kept)
    assert (seed, 2) in starts
    again = leaves_of(tmp_path / 'streamed')
    assert all((again[name] == leaf).all() for name, leaf in whole.items())


def test_the_ledger_of_a_line():
    ledger = loop.Ledger(seconds=10.0, flops=3e18, sunk_flops=1.2e19, tokens=64.0)
    line = ledger.for_the_log(num_devices=8)
    assert line['tokens'] == 64 and line['device_seconds'] == 80 and line['percent_of_sunk_flops'] == 25
    assert line['estimated_core_days'] == pytest.approx(3e18 / (0.4 * 137.5e12 * 86400))
    assert 'percent_of_sunk_flops' not in loop.Ledger().for_the_log(1)


def test_dense_flops_are_the_cost_of_a_checkpoint_without_one():
    ledger = loop.Ledger()
    ledger.start_from(7, {}, 3e18)
    assert (ledger.start_step, ledger.sunk_flops) == (7, 3e18)
    ledger.start_from(7, {'cost': {'flops': 1e18, 'sunk_flops': 1e18}}, 3e18)
    assert ledger.sunk_flops == 2e18
    ledger.start_from(7, {})
    assert ledger.sunk_flops == 0


def test_upcycled_run_starts_at_the_dense_step_and_keeps_a_receipt(tmp_path, dense):
    runs.train('upcycle', tmp_path / 'up', 6, INITIAL_CHECKPOINT_PATH=dense)
    first = lines_of(tmp_path / 'up')[0]
    assert (first['step'], first['split'], first['start_step'], first['flops']) == (4, 'validation', 4, 0)
    last_dense = lines_of(dense)[-1]
    assert first['sunk_flops'] == last_dense['flops'] > 0
    assert last_dense['tokens'] == 4 * 4 * (32 + 9) and first['tokens'] == 0
    assert last_dense['estimated_core_days'] == pytest.approx(last_dense['flops'] / (0.4 * 137.5e12 * 86400))
    receipt = json.loads((tmp_path / 'up' / 'receipt.json').read_text())
    saved = open_checkpoint(str(tmp_path / 'up')).metadata
    assert saved['receipt'] == receipt
    assert receipt['source']['step'] == 4
    assert receipt['operator'] == 'copy'
    assert len(receipt['plan']) == len(leaves_of(tmp_path / 'up'))
    for layer in receipt['function_check']['layers'].values():
        assert layer['max_abs_difference_covered'] < 1e-4
        assert layer['max_abs_on_uncovered'] == 0
    assert set(receipt['function_check']['whole_model']) == {'dense_loss', 'sparse_loss', 'loss_gap'}


def test_tiled_state_trains(tmp_path, dense):
    more = {'INITIAL_CHECKPOINT_PATH': dense, 'OPTIMIZER_STATE': 'tile'}
    runs.train('upcycle', tmp_path / 'up', 5, **more)
    leaves = leaves_of(tmp_path / 'up')
    assert leaves['opt_state/count'] == 5


@pytest.mark.exhaustive  # decoder-only runs are dropless
def test_a_dropless_decoder_upcycles_and_trains(tmp_path, dense):
    settings = {'DECODER_DISPATCH': 'ragged', 'NORMALIZE_COMBINE_WEIGHTS': True, 'SCAN_LAYERS': True, 'REMAT': 'full'}
    runs.train('upcycle', tmp_path / 'up', 6, INITIAL_CHECKPOINT_PATH=dense, **settings)
    check = json.loads((tmp_path / 'up' / 'receipt.json').read_text())['function_check']['layers']
    decoder = check['decoder/layers_1/mlp']
    assert decoder['covered'] == 1.0
    assert decoder['max_abs_difference_covered'] <= 1e-5 * max(1.0, decoder['dense_rms'])
    last = [line for line in lines_of(tmp_path / 'up') if line['split'] == 'train'][-1]
    assert last['experts/decoder/layers_1/fraction_dropped'] == 0


def test_validation_lines_hold_routing_metrics(tmp_path, capsys):
    runs.train('scratch', tmp_path, 3)
    said = [line.removesuffix(' ...') for line in capsys.readouterr().err.splitlines() if line.endswith(' ...')]
    started = ['initialising the parameters', 'validation at step 0', 'compiling the training step']
    assert said == [f'train  {operation}' for operation in started]
    last = lines_of(tmp_path)[-1]
    assert last['split'] == 'validation'
    assert last['loss'] == last['cross_entropy_loss']
    assert len(last['experts/encoder/layers_1/load']) == 4
    assert sum(last['experts/encoder/layers_1/load']) == pytest.approx(1)
    for name in (
        'fraction_tokens_left_behind',
        'expert_usage',
        'router_confidence',
        'router_entropy',
        'fraction_dropped',
    ):
        assert 0 <= last[f'experts/{name}'] <= np.log(4) + 1e-6


def test_evaluation_batches_are_made_once(tmp_path):
    asked = []

    class Counted:
        def __init__(self, source):
            self._source = source

        def __getattr__(self, name):
            return getattr(self._source, name)

        def batches(self, *args, **hosts):
            asked.append(args)
            return self._source.batches(*args, **hosts)

    run = runs.build('dense', tmp_path, 3, EVAL_PERIOD=1)
    loop.train(Start.of(dataclasses.replace(run, eval_data=Counted(run.eval_data))))
    assert [line['step'] for line in lines_of(tmp_path) if line['split'] == 'validation'] == [0, 1, 2, 3]
    assert len(asked) == 1


def test_microbatches_take_the_same_step(tmp_path):
    """Four microbatches, cut at group boundaries, give the gradient of the whole batch."""
    more = {'GROUPS_MULTIPLE_OF': 4, 'EVAL_PERIOD': 100, **runs.ONE_SPARSE_LAYER}
    runs.train('scratch', tmp_path / 'one', 2, **more)
    runs.train('scratch', tmp_path / 'four', 2, **more, NUM_MICROBATCHES=4)
    one, four = lines_of(tmp_path / 'one')[1], lines_of(tmp_path / 'four')[1]
    for name in (
        'loss',
        'cross_entropy_loss',
        'accuracy',
        'gradient_norm',
        'experts/auxiliary_loss',
        'experts/router_entropy',
    ):
        assert one[name] == pytest.approx(four[name], rel=2e-5), name


def test_other_data_is_refused_on_resume(tmp_path):
    runs.train('dense', tmp_path, 2)
    run = runs.build('dense', tmp_path, 4, DATA_SEED=1)
    with pytest.raises(UserError, match='trained on other data .*seed'):
        loop.train(Start.of(run))


def test_a_checkpoint_past_the_end_is_refused(tmp_path, dense):
    with pytest.raises(UserError, match='TRAIN_STEPS = 3'):
        runs.train('upcycle', tmp_path / 'up', 3, INITIAL_CHECKPOINT_PATH=dense)
    assert not (tmp_path / 'up').exists()


class Made:
    """A clock that is set by the test."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def booked(events):
    """Returns a ledger after seconds of 'data', 'step' (a whole step) and 'long step' (a step that does not finish)."""
    clock, ledger, ends = Made(), loop.Ledger(), []
    with loop.Timer(ledger, 0, clock) as timer:
        for event, seconds in events:
            timer.book('seconds')
            if event == 'data':
                clock.now += seconds
                timer.book_data()
            else:
                ends.append(concurrent.futures.Future())
                timer._finished = ends[-1]
                clock.now += seconds
                if event == 'step':
                    ends[-1].set_result(clock.now)
    return ledger


@pytest.mark.parametrize(
    ('events', 'waited', 'whole'),
    [
        ([('data', 5)], 5, 5),  # the first batch
        ([('step', 1), ('data', 5)], 5, 6),
        ([('long step', 1), ('data', 5)], 0, 6),
        ([('step', 1), ('data', 2), ('long step', 3), ('data', 4)], 2, 10),
    ],
)
def test_data_is_waited_for_only_while_no_step_is_under_way(events, waited, whole):
    ledger = booked(events)
    assert (ledger.data_seconds, ledger.seconds) == (waited, whole)


def test_a_step_that_ends_while_data_is_made_splits_the_time():
    clock, ledger = Made(), loop.Ledger()
    with loop.Timer(ledger, 0, clock) as timer:
        timer._finished = concurrent.futures.Future()
        clock.now = 3.0
        timer._finished.set_result(clock.now)
        clock.now = 10.0
        timer.book_data()
    assert (ledger.data_seconds, ledger.seconds) == (7.0, 10.0)


class Slow:
    """Data that takes five seconds per batch after all steps have finished."""

    def __init__(self, source, clock, timers):
        self._source, self._clock, self._timers = source, clock, timers

    def __getattr__(self, name):
        return getattr(self._source, name)

    def batches(self, *args, **hosts):
        for batch in self._source.batches(*args, **hosts):
            if self._timers and self._timers[-1]._finished is not None:
                self._timers[-1]._finished.result()
            self._clock.now += 5
            yield batch


@pytest.mark.parametrize('slow', ['data', 'step'])
def test_time_by_activity(slow, tmp_path, monkeypatch):
    """The time of a slow source or a slow step is added to its own field and to no other."""
    run = runs.build('dense', tmp_path, 4, EVAL_PERIOD=100, CHECKPOINT_PERIOD=100, LOG_PERIOD=4, EVAL_STEPS=1)
    clock, timers = Made(), []

    class Timer(loop.Timer):
        def __init__(self, ledger, step):
            super().__init__(ledger, step, clock)
            timers.append(self)

    monkeypatch.setattr(loop, 'Timer', Timer)
    if slow == 'data':
        run = dataclasses.replace(run, train_data=Slow(run.train_data, clock, timers))
    else:
        add = loop.Window.add

        def wait_and_add(self, metrics):
            clock.now += 5
            add(self, metrics)

        monkeypatch.setattr(loop.Window, 'add', wait_and_add)
    loop.train(Start.of(run))
    last = [line for line in read_metrics(f'{tmp_path}/metrics.jsonl') if line['split'] == 'train'][-1]
    assert last['seconds'] == 20
    assert last['data_seconds'] == (20 if slow == 'data' else 0)
