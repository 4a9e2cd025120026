"""Every experiment of configs/: at every scale each of its points is built."""

import pathlib

import pytest

from tests import vision
from upcycle import configuration
from upcycle.sweep import conduct, grid

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'
B16 = ('models/vit_b16.gin', 'moe/vit.gin')
# Experiment and scale: gin files and bindings that its header asks for, and its points.
SCALES = {
    ('finetune_imagenet', 'full'): (B16, {'INITIAL_CHECKPOINT_PATH': '/nowhere'}, 12),
    ('finetune_imagenet', 'mini'): ((), {}, 14),
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
    assert {path.stem for path in CONFIGS.glob('*.py')} == {name for name, _ in SCALES}


@pytest.mark.parametrize(('name', 'scale'), SCALES)
def test_every_point_is_built(name, scale, tfds_data_dir):
    data = {'TFDS_DATA_DIR': tfds_data_dir} if scale == 'full' else {}
    entries = conduct.check(points_of(name, scale, **data), checkpoints=False)
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
