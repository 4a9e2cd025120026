"""A decoder-only run needs neither TensorFlow, seqio nor TFDS."""

import json
import os
import pathlib
import subprocess
import sys

from upcycle.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_tokenize_train_eval_and_plan_import_none_of_them(tmp_path):
    command = [sys.executable, '-m', 'tests.data.without_tensorflow', str(tmp_path)]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == 'imported: []'
    assert [line['split'] for line in read_metrics(tmp_path / 'run' / 'metrics.jsonl')] == ['train', 'validation']
    (metrics,) = (json.loads((tmp_path / 'eval.json').read_text())['metrics'],)
    assert 4 < metrics['loss'] < 7
