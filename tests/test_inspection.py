"""`upcycle inspect` shows incomplete MoE layers."""

import numpy as np
import pytest

from upcycle import inspection

LAYER = 'params/encoder/layers_1/mlp'
WI, WO, ROUTER = (f'{LAYER}/{name}/kernel' for name in ('expert/wi', 'expert/wo', 'router/router_weights/w'))


class Tree:
    """A reader of arrays."""

    format, path, step, metadata = 'upcycle', 'here', None, {}

    def __init__(self, shapes):
        self._arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}

    def leaves(self):
        return self._arrays

    def read(self, name):
        return self._arrays[name]


@pytest.mark.parametrize(
    ('shapes', 'count', 'also'),
    [
        ({WI: (4, 2, 3), WO: (4, 3, 2), ROUTER: (2, 4)}, 4, {'cosine', 'router'}),
        ({ROUTER: (2, 4)}, 0, {'router'}),
        ({WI: (4, 2, 3)}, 4, {'cosine'}),
        ({WI: (4, 2, 3), WO: (3, 3, 2), ROUTER: (2, 4)}, [3, 4], {'router'}),
        ({WI: (), ROUTER: (2, 4)}, 0, {'router'}),
        ({WI: (4, 2, 3), ROUTER: (4,)}, 4, {'cosine'}),
        ({f'{LAYER}/router/scale': ()}, 0, set()),
    ],
)
def test_a_layer_that_is_not_whole(shapes, count, also, capsys):
    reader = Tree(shapes)
    found = inspection.layer_statistics(reader, LAYER)
    assert found['num_experts'] == count and found.keys() == {'num_experts', *also}
    inspection._show(inspection.describe(reader), reader, all_leaves=True)
    assert str(count) in capsys.readouterr().out


@pytest.mark.parametrize('columns', ['40', '80'])
def test_a_narrow_terminal_cuts_nothing_off(columns, capsys, monkeypatch):
    """Rich would end names in '…', and take '[seed=1]' for markup and ':x:' for a picture."""
    monkeypatch.setenv('TTY_COMPATIBLE', '1')
    monkeypatch.setenv('TERM', 'dumb')
    monkeypatch.setenv('COLUMNS', columns)
    reader = Tree({WI: (4, 2, 3), WO: (4, 3, 2), ROUTER: (2, 4), f'{LAYER}/a[seed=1]/:x:/[/b]': (1,)})
    reader.path = '/runs/[bold]a[/x]/:x:'
    monkeypatch.setattr(inspection, 'open_checkpoint', lambda path: reader)
    assert inspection.inspect('here', all_leaves=True) == 0
    out = capsys.readouterr().out
    assert '…' not in out and out.startswith(reader.path)
    leaves = out.partition('shape')[2].partition('MoE')[0]
    column = ''.join(line[: line.find('  ')] if '  ' in line else line for line in leaves.splitlines()[1:])
    assert all(name in column.replace(' ', '') for name in reader.leaves()), column
