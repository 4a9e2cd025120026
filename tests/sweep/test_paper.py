"""The paper's figures: their runs can be built at every scale, agree between figures, and have the right FLOPs."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from tests.gin.test_gin_files import step_abstractly
from upcycle import configuration, cost, partitioning
from upcycle.errors import UserError
from upcycle.sweep import grid, paper
from upcycle.training import loop
from upcycle.training.state import make_layout

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'
EXPERIMENTS = sorted(
    path.stem for pattern in ('figure_*.py', 'section_*.py', 'table_*.py') for path in CONFIGS.glob(pattern)
)
# The same shapes without the data, which takes preparation.
STAND_IN = {
    'tasks/c4_span_corruption.gin': 'tasks/synthetic_text.gin',
    'tasks/imagenet21k.gin': 'tasks/synthetic_images.gin',
    'tasks/superglue.gin': 'tasks/synthetic_text.gin',
    'tasks/imagenet2012.gin': 'tasks/synthetic_images.gin',
}
WITHOUT_RUNS = ('TRAIN_STEPS', 'RANDOM_SEED', 'DATA_SEED', 'UPCYCLE_SEED', 'MODEL_DIR', 'INITIAL_CHECKPOINT_PATH')


def points(name, scale):
    return grid.resolve(grid.load(f'configs/{name}.py', scale), '/nowhere')


def build(files, bindings):
    named = {'MODEL_DIR': '/nowhere/run', 'TRAIN_STEPS': '1000000', **bindings}
    return configuration.load([STAND_IN.get(file, file) for file in files], named)


def test_the_papers_figures_are_here():
    # 10 has 11 and 12 in it; 1 is a diagram.
    figures = {'2_language', '2_vision', *map(str, (3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15))}
    assert {f'figure_{n}' for n in figures} | {'section_5', 'table_2', 'table_3'} == set(EXPERIMENTS)


@functools.cache
def runs_of(scale):
    """The points of all experiments by name, and one run for each set that differs only in seeds and steps."""
    found, built = {}, {}
    for name in EXPERIMENTS:
        for point in points(name, scale):
            meaning = point.gin_files, point.bindings
            assert found.setdefault(point.name, meaning) == meaning, point.name
            program = {key: value for key, value in point.bindings.items() if key not in WITHOUT_RUNS}
            key = point.gin_files, tuple(sorted(program.items()))
            if key not in built:
                built[key] = build(point.gin_files, point.bindings)
    return found, tuple(built.values())


@pytest.mark.parametrize('scale', [paper.Scale.MINI, paper.Scale.FULL])
def test_every_run_is_built_and_has_one_meaning(scale):
    found, built = runs_of(scale)
    seeds = {name.split('/')[1] for name in found}
    assert {'seed_0', 'seed_1', 'seed_2'} <= seeds <= {f'seed_{i}' for i in range(6)}
    assert len(built) > 40


def steps_of(scale):
    """Runs with different training steps."""
    different = {}
    for run in runs_of(scale)[1]:
        different.setdefault((repr(run.model), repr(run.optimizer), repr(run.train_data.batch_spec())), run)
    assert len(different) > 15
    return different.values()


def test_a_program_of_each_kind_steps_abstractly():
    """The runs of the mini scale; `make test-all` runs a step of each program."""
    kinds = {}
    for run in steps_of(paper.Scale.MINI):
        layers = {(moe.router, moe.dispatch, moe.normalize_combine_weights) for moe in run.model.moe_layers().values()}
        kinds.setdefault((run.model.family, type(run.optimizer), frozenset(layers)), run)
    assert len(kinds) > 5
    for run in kinds.values():
        step_abstractly(run)


@pytest.mark.exhaustive
def test_every_program_of_the_full_scale_steps_abstractly():
    for run in steps_of(paper.Scale.FULL):
        step_abstractly(run)


@pytest.mark.exhaustive
def test_every_program_of_the_mini_scale_steps():
    for run in steps_of(paper.Scale.MINI):
        mesh = partitioning.make_mesh((1, 1, 1), run.num_experts, jax.devices()[:1])
        with partitioning.use(mesh):
            where, sharding = make_layout(run, mesh), partitioning.batch_sharding(mesh)
            shapes = run.train_data.batch_spec()
            batch = {name: np.ones(shape, dtype) for name, (shape, dtype) in shapes.items()}
            state = jax.tree.map(
                lambda leaf: jax.device_put(np.full(leaf.shape, 0.1, leaf.dtype), leaf.sharding), where.abstract
            )
            step = loop.lower_step(run, where, sharding).compile({'xla_backend_optimization_level': 0})
            state, metrics = step(state, partitioning.put_batch(batch, sharding))
        assert np.isfinite(metrics['loss'])


def test_branches_of_a_figure_spend_the_same():
    for name in ('figure_9', 'figure_5', 'figure_10'):
        spent = {}
        for point in points(name, 'mini'):
            family, seed, branch = point.name.split('/')
            if seed != 'seed_0' or branch == 'dense':
                continue
            run = build(point.gin_files, point.bindings)
            dense_steps = {'language_mini': 2000, 'vision_mini': 10_000}[family]
            flops = cost.step_flops(run.model, run.train_data.batch_spec())
            spent.setdefault(family, []).append((run.total_steps - dense_steps) * flops)
        for family, values in spent.items():
            assert len(values) > 2 and max(values) / min(values) < 1.002, (name, family)


def test_the_large_language_models_start_from_the_public_checkpoints():
    """A million steps, charged with the FLOPs of dense steps."""
    found = {point.name: point for point in points('figure_2_language', 'full')}
    assert 'language_base/seed_0/dense' in found and 'language_large/seed_0/dense' not in found
    for size in ('large', 'xl'):
        point = found[f'language_{size}/seed_0/upcycled']
        assert not point.after and f't5_1_1_{size}/checkpoint_1000000' in point.bindings['INITIAL_CHECKPOINT_PATH']
        run = build(point.gin_files, point.bindings)
        continued = found[f'language_{size}/seed_0/dense_continuation']
        dense = build(continued.gin_files, continued.bindings)
        assert run.dense_flops == pytest.approx(1e6 * cost.step_flops(dense.model, dense.train_data.batch_spec()))


def test_branches_start_at_checkpoints_that_the_dense_run_keeps():
    for point in points('figure_6', 'mini'):
        if point.after:
            path = pathlib.PurePath(point.bindings['INITIAL_CHECKPOINT_PATH'])
            step = int(path.name) if path.parent.name == 'checkpoints' else 10_000
            assert step % 1000 == 0 and int(point.bindings['TRAIN_STEPS']) > step
        else:
            assert point.bindings['CHECKPOINT_PERIOD'] == '1000' and point.bindings['CHECKPOINT_KEEP'] == 'None'


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_program_of_the_compiled_scale_is_built(name):
    programs = grid.load(f'configs/{name}.py', 'compiled').compile
    assert len({program['name'] for program in programs}) == len(programs)
    assert any(not program['name'].endswith('/dense') for program in programs)
    for program in programs:
        assert program['topology'].startswith('v4:')
        run = build(program['gin_files'], {k: grid.text_of(v) for k, v in program['bindings'].items()})
        chips = 256 if 'xl' in program['name'] else 64
        mesh = run.mesh_shape
        assert mesh[0] * mesh[1] * mesh[2] == chips


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_claim_names_runs_of_every_seed(name):
    for report in grid.load(f'configs/{name}.py', 'mini').reports:
        six = name == 'figure_2_language' or report['name'] == 'figure_3/1_language_mini'
        assert report['claims'] and len(report['groups']) == (6 if six else 3)
        for group in report['groups']:
            assert {claim[side] for claim in report['claims'] for side in ('better', 'worse')} <= group.keys()
            assert set(report['curves'] or ()) <= group.keys()


def test_no_two_reports_of_one_out_share_a_folder():
    names = [(name, 'mini') for name in EXPERIMENTS] + [
        ('operators', scale) for scale in ('operators', 'recipes', 'to_dense')
    ]
    reports = [report for name, scale in names for report in grid.load(f'configs/{name}.py', scale).reports]
    folders = [report['name'] for report in reports]
    assert len(set(folders)) == len(folders) > len(EXPERIMENTS)


def test_settings_are_files_of_their_own():
    kinds = sorted(path.stem for path in (CONFIGS / 'settings').glob('*.py'))
    names = [paper.setting_of(kind, scale).name for kind in kinds for scale in paper.Scale]
    assert {'language_mini', 'vision_mini', 'language_base', 'vision_b16'} <= set(names)
    with pytest.raises(UserError, match=r'configs/settings/speech\.py does not exist'):
        paper.setting_of('speech', paper.Scale.MINI)
