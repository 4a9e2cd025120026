"""Schedules against the formulas of T5X and big_vision, and the policies for a dense run's schedule."""

import math
import shutil
from types import SimpleNamespace

import pytest

from tests import runs, vision
from upcycle import warning
from upcycle.commands import train
from upcycle.errors import UserError
from upcycle.metrics import read_metrics
from upcycle.training.schedule import LearningRate
from upcycle.training.state import check_start

VISION = 'constant * linear_warmup * rsqrt * linear_cooldown'


def test_rsqrt_is_t5x_pretraining():
    rate = LearningRate().schedule(0, 2_000_000)
    assert float(rate(0)) == pytest.approx(0.01)
    assert float(rate(9_999)) == pytest.approx(0.01)
    assert float(rate(1_000_000)) == pytest.approx(1e-3)


def test_factors_multiply():
    rate = LearningRate('constant * linear_warmup * rsqrt_normalized_decay', 0.5, 100).schedule(0, 1000)
    assert float(rate(50)) == pytest.approx(0.25)
    assert float(rate(400)) == pytest.approx(0.25)


def test_rsqrt_with_cooldown_is_big_visions():
    rate = LearningRate(VISION, 8e-4, 100, timescale=1000, cooldown_steps=200).schedule(0, 2000)
    for step in (0, 37, 100, 101, 950, 1800, 1801, 1999, 2000):
        expected = 8e-4 / math.sqrt(1 + max(step - 100, 0) / 1000)
        expected *= min(1, step / 100) * min(1, (2000 - step) / 200)
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_warmup_stable_decay():
    rate = LearningRate('constant * linear_warmup * linear_cooldown', 4e-3, 100, cooldown_steps=200).schedule(0, 1000)
    expected = {0: 0, 50: 2e-3, 100: 4e-3, 500: 4e-3, 800: 4e-3, 900: 2e-3, 1000: 0}
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected)


def test_cosine_goes_from_the_end_of_the_warmup_to_the_last_step():
    rate = LearningRate('constant * linear_warmup * cosine_decay', 0.03, 200).schedule(0, 5000)
    assert [float(rate(step)) for step in (0, 100, 200)] == pytest.approx([0, 0.015, 0.03], rel=1e-3)
    assert float(rate(2600)) == pytest.approx(0.015)
    assert float(rate(5000)) == pytest.approx(0, abs=1e-8)
    # After its end it stays constant and does not restart.
    assert float(rate(5100)) == pytest.approx(0, abs=1e-8)


def test_continuing_keeps_the_dense_schedule():
    """Without a cooldown the rate is the dense run's, for any start and end of the new run."""
    dense, branch = LearningRate().schedule(0, 1_000_000), LearningRate().schedule(1_000_000, 1_500_000)
    assert float(branch(1_000_000)) == float(dense(1_000_000))


def test_restart_returns_to_the_peak_and_ends_at_the_dense_rate():
    dense = LearningRate().schedule(0, 40_000)
    rate = LearningRate(policy='restart', restart_warmup_steps=100).schedule(40_000, 50_100)
    assert float(rate(40_000)) == 0
    assert float(rate(40_100)) == pytest.approx(float(dense(10_000)))
    assert float(rate(45_100)) == pytest.approx((0.01 + 0.005) / 2)
    assert float(rate(50_100)) == pytest.approx(float(dense(40_000)))


def test_restart_to_a_given_peak_and_minimum():
    rate = LearningRate(policy='restart', peak_learning_rate=2e-4, min_learning_rate=2e-6).schedule(70, 170)
    assert float(rate(70)) == pytest.approx(2e-4)
    assert float(rate(170)) == pytest.approx(2e-6)


def test_minimum_stays():
    assert float(LearningRate(policy='minimum').schedule(1_000_000, 2_000_000)(1_700_000)) == pytest.approx(1e-3)
    given = LearningRate(policy='minimum', min_learning_rate=3e-5).schedule(5, 10)
    assert float(given(7)) == pytest.approx(3e-5)


def test_which_schedules_depend_on_their_end():
    assert not LearningRate().falls_towards_the_end
    assert not LearningRate(VISION).falls_towards_the_end
    assert LearningRate(VISION, cooldown_steps=5).falls_towards_the_end
    assert LearningRate('constant * cosine_decay').falls_towards_the_end
    assert LearningRate(policy='restart').falls_towards_the_end
    assert not LearningRate('constant * cosine_decay', policy='minimum').falls_towards_the_end


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'factors': 'constant * cosin'}, ['LEARNING_RATE_FACTORS', 'cosin', 'cosine_decay']),
        ({'cooldown_steps': 5}, ['COOLDOWN_STEPS = 5', 'linear_cooldown']),
        ({'policy': 'anew'}, ['LEARNING_RATE_POLICY', 'anew', 'restart']),
    ],
)
def test_mistakes(settings, words):
    with pytest.raises(UserError) as error:
        LearningRate(**settings)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ('rate', 'words'),
    [
        (LearningRate(VISION, cooldown_steps=11), ['COOLDOWN_STEPS = 11', 'TRAIN_STEPS = 20']),
        (LearningRate(policy='restart', restart_warmup_steps=10), ['RESTART_WARMUP_STEPS = 10', 'TRAIN_STEPS = 20']),
    ],
)
def test_a_run_too_short(rate, words):
    with pytest.raises(UserError) as error:
        rate.schedule(10, 20)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ('rate', 'warns'),
    [
        (LearningRate(VISION, warmup_steps=20), True),
        (LearningRate(VISION, warmup_steps=19), False),
        (LearningRate(warmup_steps=20), False),  # constant until then
        (LearningRate(VISION, warmup_steps=20, policy='restart'), False),
    ],
)
def test_a_run_that_ends_in_its_warmup_warns(rate, warns, capsys):
    warning.forget()
    check_start(SimpleNamespace(learning_rate=rate, total_steps=20, initial_checkpoint_path='dense'), 10)
    error = capsys.readouterr().err
    assert ('WARMUP_STEPS = 20' in error and 'TRAIN_STEPS = 20' in error and 'lower WARMUP_STEPS' in error) == warns


def test_a_run_from_scratch_has_no_dense_schedule_to_leave(tmp_path):
    with pytest.raises(UserError, match='LEARNING_RATE_POLICY'):
        runs.build('dense', tmp_path, 4, LEARNING_RATE_POLICY='restart')


def test_a_run_that_cools_down_cannot_be_made_longer(tmp_path):
    files = (vision.MODEL, vision.TASK, 'runs/pretrain.gin')
    train.run(files, vision.bindings(tmp_path / 'run', 2, COOLDOWN_STEPS=1))
    with pytest.raises(UserError, match='total_steps is 2 and not 3'):
        train.run(files, vision.bindings(tmp_path / 'run', 3, COOLDOWN_STEPS=1))


def test_a_restarted_run_logs_its_peak_also_when_it_is_resumed(tmp_path):
    dense = vision.dense_checkpoint(str(tmp_path))
    more = {'INITIAL_CHECKPOINT_PATH': dense, 'LEARNING_RATE_POLICY': 'restart', 'PEAK_LEARNING_RATE': 0.5}
    more |= {'MIN_LEARNING_RATE': 0, 'CHECKPOINT_PERIOD': 1, 'CHECKPOINT_KEEP': None}
    files = (vision.MODEL, vision.TASK, 'runs/continue_dense.gin')
    train.run(files, vision.bindings(tmp_path / 'run', 4, **more))
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
    train.run(files, vision.bindings(tmp_path / 'run', 4, **more))
    lines = [line for line in read_metrics(str(tmp_path / 'run' / 'metrics.jsonl')) if line['split'] == 'train']
    assert [line['learning_rate'] for line in lines] == pytest.approx([0.5, 0.25])
