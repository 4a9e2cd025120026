"""The notebook: ten cells that run in order, at a small size, without outputs of somebody's run in the file."""

import ast
import json

import pytest

from tests import runs
from tests.docs.pages import DOCS
from upcycle import gin_files
from upcycle.metrics import read_metrics


@pytest.fixture(scope='module')
def cells():
    notebook = json.loads((DOCS / 'upcycle_in_colab.ipynb').read_text(encoding='utf-8'))
    return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def test_outputs_are_stripped(cells):
    assert len(cells) == 10
    assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in cells)


@pytest.mark.exhaustive
def test_it_runs(cells, tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip('matplotlib.pyplot')
    plt.switch_backend('Agg')
    drawn = []
    monkeypatch.setattr(plt, 'show', lambda: drawn.extend(line.get_label() for line in plt.gca().get_lines()))
    monkeypatch.chdir(tmp_path)
    # The cells' own files and steps, of a size for tests.
    lines = [f'{name} = {gin_files.literal(value)}' for name, value in runs.SMALL_STEPS.items()]
    more = ['EVAL_BATCH_SIZE = 4', 'NUM_EXPERTS = 2', 'NORMALIZE_COMBINE_WEIGHTS = True']
    more += [f'NUM_{stack}_LAYERS = 1' for stack in ('ENCODER', 'DECODER')]
    more += [f'{stack}_MOE_LAYERS = (0,)' for stack in ('ENCODER', 'DECODER')]
    (tmp_path / 'small.gin').write_text('\n'.join([*lines, *more, '']))
    names = {}
    for cell in cells:
        source = ''.join(line for line in cell['source'] if not line.startswith('%'))
        exec(compile(ast.parse(source), 'cell', 'exec'), names)
        if 'STEPS' in names:
            names |= {'MODEL': runs.TINY, 'SETTINGS': 'small.gin', 'STEPS': 2}
    plt.close('all')
    assert drawn == ['dense', 'continued', 'upcycled']
    for name in ('continued', 'upcycled'):
        assert read_metrics(str(tmp_path / 'runs' / name / 'metrics.jsonl'))[-1]['step'] == 4
    assert 'encoder/layers_0/mlp' in capsys.readouterr().out
    for check in names['receipt']['function_check']['layers'].values():
        assert check['max_abs_difference_covered'] < 1e-5 * max(1.0, check['dense_rms'])
