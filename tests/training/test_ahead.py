"""Reading batches ahead, and the figures of speed."""

import types

import pytest

from upcycle import chips
from upcycle.training.ahead import Ahead
from upcycle.training.ledger import Ledger, Timer, Work


def reading(events, numbers, error=None):
    for number in numbers:
        events.append(f'reads {number}')
        yield number
    if error is not None:
        raise error


def test_a_batch_is_read_before_the_step_that_needs_it():
    events = []
    with Timer(Ledger(), 0) as timer:
        batches = Ahead(reading(events, range(3)), timer)
        for step in range(3):
            events.append(f'step {batches.take()}')
            if step < 2:
                batches.prepare()
                batches.prepare()  # holds one batch only
    assert events == ['reads 0', 'step 0', 'reads 1', 'step 1', 'reads 2', 'step 2']


def test_an_error_waits_for_the_step_that_needs_the_batch():
    with Timer(Ledger(), 0) as timer:
        batches = Ahead(reading([], [0], ValueError('the file is damaged')), timer)
        assert batches.take() == 0
        batches.prepare()
        for _ in range(2):
            with pytest.raises(ValueError, match='the file is damaged'):
                batches.take()


def test_the_time_of_reading_ahead_is_waiting_only_if_no_step_is_under_way():
    now, ledger = [0.0], Ledger()

    def slow():
        while True:
            now[0] += 5.0
            yield now[0]

    with Timer(ledger, 0, lambda: now[0]) as timer:
        batches = Ahead(slow(), timer)
        batches.take()
        timer._finished = types.SimpleNamespace(done=lambda: False)
        batches.prepare()
        assert (ledger.seconds, ledger.data_seconds) == (10.0, 5.0)
        timer._finished = types.SimpleNamespace(done=lambda: True, result=lambda: 12.0)
        batches.take()
        batches.prepare()
        assert (ledger.seconds, ledger.data_seconds) == (15.0, 8.0)
        assert timer.since_last(2) == (2, 15.0, 8.0)
        assert timer.since_last(2) == (0, 0.0, 0.0)


def test_figures_of_speed():
    work = Work('token', units=4096, flops=3e12, devices=2, peak=1e13)
    speed = work.speed(4, seconds=2.0, waiting=0.5)
    expected = {'steps_per_second': 2.0, 'device_busy': 0.75, 'tokens_per_second_per_device': 4096.0, 'mfu': 0.3}
    assert speed == pytest.approx(expected)
    assert work.shown(speed) == ['4,096 tokens/s/device', 'busy 75%', 'MFU 30.0%']
    unknown = Work('image', 8, 3e12, 2, None)
    assert unknown.speed(4, 2.0, 0.5) == {
        'steps_per_second': 2.0,
        'device_busy': 0.75,
        'images_per_second_per_device': 8,
    }
    assert unknown.shown(unknown.speed(4, 2.0, 0.5)) == ['8.0 images/s/device', 'busy 75%']
    assert unknown.speed(0, 0.0, 0.0) == {'steps_per_second': 0.0} and unknown.shown({'steps_per_second': 0.0}) == []


@pytest.mark.parametrize(
    ('platform', 'kind', 'cores', 'peak'),
    [
        ('tpu', 'TPU v3', 1, 61.5e12),  # a device is a core, half of a chip
        ('tpu', 'TPU v4', 2, 275e12),
        ('tpu', 'TPU v5 lite', 1, 197e12),
        ('tpu', 'TPU v5', 2, 459e12),
        ('tpu', 'TPU v6 lite', 1, 918e12),
        ('tpu', 'TPU v4 lite', 1, None),
        ('gpu', 'NVIDIA H100 80GB HBM3', None, 989e12),
        ('gpu', 'NVIDIA H100 PCIe', None, 756e12),
        ('gpu', 'NVIDIA H200', None, 989e12),
        ('gpu', 'NVIDIA GB200', None, 2500e12),
        ('gpu', 'NVIDIA A100-SXM4-40GB', None, 312e12),
        ('gpu', 'NVIDIA A10', None, 125e12),
        ('gpu', 'NVIDIA H200 MIG 1g.18gb', None, None),
        ('gpu', 'Tesla V100-SXM2-16GB', None, None),
        ('cpu', 'cpu', None, None),
    ],
)
def test_the_peak_of_a_device(platform, kind, cores, peak):
    device = types.SimpleNamespace(platform=platform, device_kind=kind, num_cores=cores)
    assert chips.peak_flops(device) == peak
