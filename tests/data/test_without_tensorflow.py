"""A decoder-only run needs neither TensorFlow, seqio nor TFDS, and resumes with the same losses."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from upcycle.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_no_command_imports_any_of_them(tmp_path):
    command = [sys.executable, '-m', 'tests.data.without_tensorflow', str(tmp_path)]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == 'imported: []'
    assert (tmp_path / 'moe' / 'config.json').exists()
    first, lines = map(read_metrics, (tmp_path / 'first.jsonl', tmp_path / 'run' / 'metrics.jsonl'))
    losses = [[(line['split'], line['step'], line['loss']) for line in log] for log in (first, lines)]
    assert [loss[:2] for loss in losses[0] if loss[0] == 'train'] == [('train', step) for step in (1, 2, 3, 4)]
    assert losses[0] == losses[1]  # of the resumed run
    metrics = json.loads((tmp_path / 'eval.json').read_text())['metrics']['validation']
    assert metrics['loss'] == pytest.approx(lines[-1]['loss'], abs=1e-5) and 4 < metrics['loss'] < 7
    assert metrics['perplexity'] == pytest.approx(math.exp(metrics['loss']), rel=1e-5)
    # A document of 28 or so bytes has as many targets, of which EOS has no text.
    assert metrics['loss'] < math.log(2) * metrics['bits_per_byte'] < 1.1 * metrics['loss']
    for name in ('perplexity', 'bits_per_byte'):
        assert metrics[name] == pytest.approx(lines[-1][name], rel=1e-5)
