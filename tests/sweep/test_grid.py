"""Grids: axes, products, the command line, configs, and the order of points."""

import ml_collections
import pytest

from upcycle.errors import UserError
from upcycle.sweep import grid
from upcycle.sweep.grid import axis, from_command_line, load, parse_axis, points, product, resolve


def test_axes_change_together_or_multiply():
    both = axis(TRAIN_STEPS=[5, 10], WARMUP_STEPS=[1, 2])
    assert both == [{'TRAIN_STEPS': 5, 'WARMUP_STEPS': 1}, {'TRAIN_STEPS': 10, 'WARMUP_STEPS': 2}]
    made = product(both, axis(LR=[0.1, 0.3, 1.0]))
    assert len(made) == 6
    assert made[1] == {'TRAIN_STEPS': 5, 'WARMUP_STEPS': 1, 'LR': 0.3}
    with pytest.raises(ValueError):
        axis(TRAIN_STEPS=[5, 10], WARMUP_STEPS=[1])


@pytest.mark.parametrize(
    ('text', 'values'),
    [
        ('E=2,4,8', [2, 4, 8]),
        ('CF=1,1.5', [1, 1.5]),
        ('OPTIMIZER_STATE=tile,fresh', ['tile', 'fresh']),
        ('MESH_SHAPE=(1, 2, 1),(2, 1, 1)', [(1, 2, 1), (2, 1, 1)]),
        ('FACTORS=constant * rsqrt_decay', ['constant * rsqrt_decay']),
        ('NORMALIZE=True,False', [True, False]),
    ],
)
def test_command_line_axes(text, values):
    name = text.split('=')[0]
    assert parse_axis(text) == [{name: value} for value in values]


@pytest.mark.parametrize('text', ['E', 'E=', '=2', 'E=a,,b'])
def test_command_line_axes_that_are_none(text):
    with pytest.raises(UserError, match='--grid'):
        parse_axis(text)


def test_points_of_the_command_line():
    config = from_command_line(['a.gin', 'b.gin'], ['E=2,4', 'OPTIMIZER_STATE=tile,fresh'])
    made = resolve(config, 'out', bindings={'TRAIN_STEPS': '7'})
    assert [point.name for point in made] == [
        'E=2,OPTIMIZER_STATE=tile',
        'E=2,OPTIMIZER_STATE=fresh',
        'E=4,OPTIMIZER_STATE=tile',
        'E=4,OPTIMIZER_STATE=fresh',
    ]
    first = made[0]
    assert first.gin_files == ('a.gin', 'b.gin')
    assert first.bindings == {'E': '2', 'OPTIMIZER_STATE': 'tile', 'TRAIN_STEPS': '7', 'MODEL_DIR': f'out/{first.name}'}
    assert first.settings == {'E': 2, 'OPTIMIZER_STATE': 'tile'}
    assert first.command.startswith('upcycle train --gin_file=a.gin --gin_file=b.gin --gin.E=2 ')
    with pytest.raises(UserError, match='names E twice'):
        from_command_line(['a.gin'], ['E=2', 'E=4'])


def test_names_of_points_are_names_of_folders():
    made = points([], {}, axis(PATH=['/a/b c', "{'x': 1}"]))
    assert all('/' not in point['name'] and ' ' not in point['name'] for point in made)


def test_points_that_start_from_others_come_after_them():
    config = ml_collections.ConfigDict({'name': 'x'})
    config.points = [
        *points(['up.gin'], {}, axis(E=[2, 4]), prefix='up/', start='dense'),
        {'name': 'dense', 'gin_files': ['dense.gin'], 'bindings': {'TRAIN_STEPS': 10, 'a/b.c': (1, 2)}},
    ]
    dense, up, _ = resolve(config, '/out', gin_files=['model.gin'])
    assert (dense.name, dense.after, dense.gin_files) == ('dense', (), ('model.gin', 'dense.gin'))
    assert dense.bindings == {'TRAIN_STEPS': '10', 'a/b.c': '(1, 2)', 'MODEL_DIR': '/out/dense'}
    assert (up.name, up.after) == ('up/E=2', ('dense',))
    assert up.bindings['INITIAL_CHECKPOINT_PATH'] == '/out/dense'


def test_points_that_cannot_be():
    config = ml_collections.ConfigDict({'name': 'x', 'points': points([], {}, axis(E=[2]), start='dense')})
    with pytest.raises(UserError, match='E=2 starts from dense'):
        resolve(config, 'out')
    config = ml_collections.ConfigDict({'name': 'x', 'points': points([], {}, axis(E=[2, 2]))})
    with pytest.raises(UserError, match='E=2 twice'):
        resolve(config, 'out')


CONFIGS = {
    'no function': ('x = 1', ['get_config']),
    'no points': (
        "import ml_collections\ndef get_config(scale='full'):\n  return ml_collections.ConfigDict()",
        ['points'],
    ),
    'no Python': ('def', ['SyntaxError']),
    'fails': ('def get_config(scale=1):\n  return 1 / 0', ['ZeroDivisionError']),
    'another scale': (
        "from upcycle.sweep import grid\ndef get_config(scale='full'):\n  grid.one_of_scales(scale, 'mini', 'full')",
        ['--scale=huge is unknown: it must be one of mini, full'],
    ),
}


@pytest.mark.parametrize('mistake', CONFIGS)
def test_configs_that_are_none(mistake, tmp_path):
    text, words = CONFIGS[mistake]
    (tmp_path / 'bad.py').write_text(text)
    with pytest.raises(UserError) as error:
        load(str(tmp_path / 'bad.py'), 'huge' if mistake == 'another scale' else None)
    assert all(word in str(error.value) for word in words), error.value


def test_a_config_that_is_not_there():
    with pytest.raises(UserError, match='--config=configs/figure_99.py does not exist'):
        load('configs/figure_99.py', None)


def test_binding_text_is_the_command_lines():
    assert [grid.text_of(value) for value in ('tile', 0.1, (1, 2), True)] == ['tile', '0.1', '(1, 2)', 'True']


def test_a_point_may_start_from_several_steps():
    points = [
        {'name': 'dense', 'gin_files': [], 'bindings': {}},
        {'name': 'one', 'gin_files': [], 'bindings': {}, 'start': 'dense', 'checkpoints': [10]},
        {'name': 'two', 'gin_files': [], 'bindings': {}, 'start': 'dense', 'checkpoints': [10, 20]},
    ]
    resolved = grid.resolve(ml_collections.ConfigDict({'name': 'x', 'points': points}), '/out')
    paths = [point.bindings.get('INITIAL_CHECKPOINT_PATH') for point in resolved]
    assert paths == [
        None,
        '/out/dense/checkpoints/10',
        repr(('/out/dense/checkpoints/10', '/out/dense/checkpoints/20')),
    ]
