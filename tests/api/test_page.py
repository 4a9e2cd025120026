"""Runs the code of docs/api.md at a small size."""

import re

import numpy as np

from tests import runs
from tests.docs.pages import DOCS
from upcycle import gin_files

_FENCE = re.compile(r'^```python\n(.*?)^```', re.DOTALL | re.MULTILINE)
SMALL = {
    "'models/t5_1_1_base.gin'": repr(runs.TINY),
    "'tasks/c4_span_corruption.gin'": repr(runs.TASK),
    "'moe/t5.gin')": "'moe/t5.gin', 'runs/convert.gin', 'small.gin')",
    "'runs/upcycle.gin')": "'runs/upcycle.gin', 'small.gin')",
    'TRAIN_STEPS=1100000': 'TRAIN_STEPS=5',
    'NUM_EXPERTS=4)': 'NUM_EXPERTS=4, ENCODER_MOE_LAYERS=(0,), DECODER_MOE_LAYERS=(0,))',
}


def test_the_code_of_the_page(untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {**runs.SMALL_STEPS, **runs.ONE_SPARSE_LAYER, 'NUM_EXPERTS': '4', 'EVAL_BATCH_SIZE': '4'}
    lines = [f'{name} = {gin_files.literal(value)}' for name, value in settings.items()]
    (tmp_path / 'small.gin').write_text('\n'.join([*lines, '']))
    fences = _FENCE.findall((DOCS / 'api.md').read_text(encoding='utf-8'))
    assert len(fences) == 7
    names = {}
    for fence in fences:
        for written, here in SMALL.items():
            fence = fence.replace(written, here)
        exec(compile(fence.replace('/path/to/dense', untrained), 'docs/api.md', 'exec'), names)
    assert names['state'].step == 1000
    assert all(len(text) <= 8 and set(text[:-1]).isdisjoint({1}) for text in names['texts']) and names['texts'][0]
    assert names['receipt']['function_check']['whole_model']['max_abs_difference'] < 1e-5
    np.testing.assert_allclose(names['logits'], names['dense'].apply(names['params'], names['image']), atol=1e-5)
    assert 'params/decoder/layers_0/mlp/expert/wi_0/kernel experts' in capsys.readouterr().out
    assert (tmp_path / 'runs' / 'upcycled' / 'receipt.json').is_file()


def test_the_upcycling_is_about_twenty_lines():
    fences = _FENCE.findall((DOCS / 'api.md').read_text(encoding='utf-8'))
    (whole,) = (fence for fence in fences if 'MoERule' in fence)
    assert sum(bool(line.strip()) for line in whole.splitlines()) <= 30
