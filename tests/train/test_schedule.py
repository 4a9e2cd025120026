"""Schedules, against the formulas in T5X's documentation."""

import pytest

from upcycle.errors import UserError
from upcycle.train.schedule import create_learning_rate_scheduler


def test_rsqrt_is_t5x_pretraining():
    rate = create_learning_rate_scheduler()
    assert float(rate(0)) == pytest.approx(0.01)
    assert float(rate(9_999)) == pytest.approx(0.01)
    assert float(rate(1_000_000)) == pytest.approx(1e-3)


def test_factors_multiply():
    rate = create_learning_rate_scheduler('constant * linear_warmup * rsqrt_normalized_decay', 0.5, 100)
    assert float(rate(50)) == pytest.approx(0.25)
    assert float(rate(400)) == pytest.approx(0.25)


def test_unknown_factor():
    with pytest.raises(UserError, match='LEARNING_RATE_FACTORS'):
        create_learning_rate_scheduler('constant * cosin')
