"""Builds every point of every experiment in configs/ at every scale."""

import pathlib

import pytest

from tests import vision
from tests.sweep import test_paper
from upcycle import configuration
from upcycle.sweep import conduct, grid

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'
B16 = ('models/vit_b16.gin', 'moe/vit.gin')
BASE = ('models/t5_1_1_base.gin', 'moe/t5.gin')
# Experiment and scale: the gin files and bindings that its header asks for, and its number of points.
SCALES = {
    ('finetune_imagenet', 'full'): (B16, {'INITIAL_CHECKPOINT_PATH': '/nowhere'}, 12),
    ('finetune_imagenet', 'mini'): ((), {}, 14),
    ('finetune_superglue', 'full'): (BASE, {'INITIAL_CHECKPOINT_PATH': '/nowhere'}, 3),
    ('operators', 'operators'): ((), {}, 115),
    ('operators', 'recipes'): ((), {}, 80),
    ('operators', 'to_dense'): ((), {}, 45),
    ('operators', 'mini'): ((), {}, 36),
}


@pytest.fixture(scope='module')
def tfds_data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('tfds'))
    vision.store_as_tfds('imagenet2012', ('train', 'validation'), 1000, folder)
    return folder


def points_of(name, scale, **more):
    files, bindings, count = SCALES[name, scale]
    bindings = {**bindings, **more}
    points = grid.resolve(grid.load(f'configs/{name}.py', scale), '/nowhere', files, bindings)
    assert len(points) == count
    return points


def test_no_config_is_left_out():
    here = {path.stem for path in CONFIGS.glob('*.py')}
    assert here == {name for name, _ in SCALES} | set(test_paper.EXPERIMENTS)


@pytest.mark.parametrize(('name', 'scale'), SCALES)
def test_every_point_is_built(name, scale, tfds_data_dir):
    data = {}
    if name == 'finetune_imagenet' and scale == 'full':
        data = {'TFDS_DATA_DIR': tfds_data_dir}
    if name == 'finetune_superglue':  # in the same format, without the `t5` package
        data = {'MIXTURE_OR_TASK_NAME': 'small_glue', 'MIXTURE_OR_TASK_MODULE': 'tests.evaluate.small_tasks'}
    entries = conduct.check(points_of(name, scale, **data), here=False)
    assert all(entry.total_steps > 0 and entry.step_flops > 0 for entry in entries)


def test_the_papers_twelve_runs():
    points = points_of('finetune_imagenet', 'mini')[2:]
    steps = {(p.bindings['TRAIN_STEPS'], p.bindings['WARMUP_STEPS'], p.bindings['BASE_LEARNING_RATE']) for p in points}
    assert len(steps) == 12
    assert {(int(s) * 100, int(w) * 100) for s, w, _ in steps} == {(5000, 200), (10_000, 400)}
    assert all(
        p.after == ('upcycled',) and p.bindings['INITIAL_CHECKPOINT_PATH'] == '/nowhere/upcycled' for p in points
    )
    run = configuration.load(points[0].gin_files, points[0].bindings)
    assert run.surgery.new_head and run.dense_step == 0
    assert type(run.optimizer).__name__ == 'Sgd' and run.optimizer.momentum == 0.9


def test_every_operator_and_recipe_has_its_branches():
    here = {
        file
        for scale in ('operators', 'recipes', 'to_dense')
        for point in points_of('operators', scale)
        for file in point.gin_files
    }
    gin = CONFIGS.parent / 'gin'
    all_files = {f'{folder}/{path.name}' for folder in ('surgery', 'recipes') for path in (gin / folder).glob('*.gin')}
    # Gated shared experts are Qwen2-MoE's.
    assert all_files - here == {'surgery/copy.gin', 'recipes/gated_shared_expert.gin'}


def test_a_warm_start_keeps_the_weights_alone():
    (point,) = (p for p in points_of('operators', 'operators') if p.name == 'seed_0/warm_start')
    run = configuration.load(point.gin_files, point.bindings)
    assert run.surgery.optimizer_state == 'fresh_clock' and run.learning_rate.policy == 'restart'
    assert run.learning_rate.restart_warmup_steps == 100


def test_branches_of_one_seed_cost_the_same():
    points = [p for p in points_of('operators', 'operators') if p.name.startswith('seed_3/')]
    entries = {e.point.name.split('/')[1]: e for e in conduct.check(points, here=False)}
    dense = entries['dense']
    budget = 2000 * entries['copy'].step_flops
    for name, entry in entries.items():
        if name not in ('dense', 'half_of_the_experts', 'grow', 'grow_gradient', 'merge', 'MoE_from_scratch'):
            spent = (entry.total_steps - dense.total_steps) * entry.step_flops
            assert spent == pytest.approx(budget, rel=1e-3), name
    grown = [entries['half_of_the_experts'], entries['grow']]
    legs = [grown[0].total_steps - dense.total_steps, grown[1].total_steps - grown[0].total_steps]
    assert sum(n * e.step_flops for n, e in zip(legs, grown, strict=True)) == pytest.approx(budget, rel=0.01)
    branches = next(p for p in points if p.name.endswith('/branches'))
    assert branches.bindings['INITIAL_CHECKPOINT_PATH'].count('seed_3/dense/checkpoints/') == 4
