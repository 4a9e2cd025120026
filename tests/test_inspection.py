"""`upcycle inspect` of MoE layers that are not whole: it says what is there."""

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
