"""scripts/long_run.py: what counts as drift, and a real run."""

import subprocess
import sys

import pytest

from tests.scripts.load import SCRIPTS, script

long_run = script('long_run')


def rows(memory=lambda i: 500, pace=lambda i: 1.0, log=lambda i: 100):
    """Returns twenty rows of 1,000 steps each, from MiB, seconds and bytes per row."""
    found, seconds, size = [], 0.0, 0
    for i in range(20):
        seconds, size = seconds + pace(i), size + log(i)
        found.append(long_run.Row(1000 * (i + 1), int(memory(i) * 2**20), seconds, size))
    return found


@pytest.mark.parametrize(
    ('changes', 'complaint'),
    [
        ({}, None),
        ({'memory': lambda i: 100 + 400 * (i > 2)}, None),  # warming up
        ({'memory': lambda i: 500 + 2 * i}, None),
        ({'memory': lambda i: 500 + 6 * i}, 'memory drifts: 542 MiB became 602'),
        ({'pace': lambda i: 9.0 if i % 5 == 0 else 1.0}, None),  # a busy machine, now and then
        ({'pace': lambda i: 1 + 0.05 * i}, 'step time drifts: 1.35 ms became 1.85'),
        ({'log': lambda i: 100 + 3 * i}, 'the log drifts: 0.1 bytes a step became 0.2'),
    ],
)
def test_what_drift_is(changes, complaint):
    assert long_run.drifts(rows(**changes)) == ([] if complaint is None else [complaint])


@pytest.mark.exhaustive
def test_it_watches_a_run(tmp_path):
    """Sixteen steps are too few to judge drift, so either verdict passes."""
    result = subprocess.run(
        [sys.executable, SCRIPTS / 'long_run.py', '--steps=16', '--every=2', f'--model_dir={tmp_path}'],
        capture_output=True,
        text=True,
    )
    head, *lines, verdict = result.stdout.splitlines()
    assert head.split() == ['step', 'MiB', 'ms', 'a', 'step', 'KiB', 'of', 'log'], result.stdout + result.stderr
    table = [[float(cell) for cell in line.split()] for line in lines[:8]]
    assert [row[0] for row in table] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert all(memory > 100 and pace > 0 for _, memory, pace, _ in table)
    assert [row[3] for row in table] == sorted(row[3] for row in table)
    assert result.returncode == ('drifts' in verdict)
