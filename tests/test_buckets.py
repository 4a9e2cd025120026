"""A run whose folder lies in a bucket is the run on disk: trained, resumed, evaluated and reported."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip('gcsfs', reason='needs gcsfs (pip install upcycle[test])')
pytest.importorskip('gcp_storage_emulator', reason='needs gcp-storage-emulator (pip install upcycle[test])')


def test_runs_in_a_bucket_are_runs_on_disk(tmp_path):
    program = [sys.executable, '-m', 'tests.on_a_bucket', str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    there = {line.split(': ')[1] for line in done.stdout.splitlines() if line.startswith('in the bucket: ')}
    assert {'config.gin', 'metrics.jsonl', 'receipt.json', 'checkpoints', 'train', 'validation'} <= there
    local, remote = (json.loads((tmp_path / name).read_text()) for name in ('local.json', 'remote.json'))
    assert local['step'] == remote['step'] == 8
    assert local['metrics'] == remote['metrics']
    # The lines of the first leg are still there after the second.
    rows = [(tmp_path / f'report_{name}' / 'report.csv').read_text().splitlines() for name in ('local', 'remote')]
    assert len(rows[0]) == len(rows[1]) == 3
