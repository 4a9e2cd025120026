"""Running a grid: order, finished points, failures, time left, the best point; and a real sweep of two tiny runs."""

import json
import os
import shutil
import types

import numpy as np
import pytest

from tests import vision
from tests.checkpoints import trees
from tests.test_cli import call
from upcycle.errors import UserError
from upcycle.metrics import read_metrics
from upcycle.report.plots.figure import Plot
from upcycle.sweep import conduct, launchers, reports
from upcycle.sweep import grid as grids
from upcycle.sweep.conduct import Entry
from upcycle.sweep.points import Point, Progress, Status, progress_of


class Pretend(launchers.Launcher):
    """A launcher of runs that take no time: they write a log and a checkpoint, or fail."""

    def __init__(self, fails=(), slots=1):
        self.slots, self.fails = slots, fails
        self.started, self.stopped = [], []

    def start(self, arguments, log):
        model_dir = next(a.partition('=')[2] for a in arguments if a.startswith('--gin.MODEL_DIR='))
        name = os.path.basename(model_dir)
        self.started.append(name)
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, 'a', encoding='utf-8') as file:
            file.write('something\n')
            if name in self.fails:
                file.write('upcycle: NAME = 3 is wrong: make it 4.\nsomething else\n')
        if name in self.fails:
            return self
        os.makedirs(os.path.join(model_dir, 'checkpoints', '10'))
        cost = {'start_step': 0, 'seconds': 2.0, 'flops': 50.0}
        lines = [{'step': 10, 'split': 'train', 'loss': 9.0, **cost}]
        lines.append({'step': 10, 'split': 'validation', 'loss': 1.0 + len(self.started), 'accuracy': 0.5, **cost})
        with open(os.path.join(model_dir, 'metrics.jsonl'), 'w', encoding='utf-8') as file:
            file.writelines(json.dumps(line) + '\n' for line in lines)
        return self

    def poll(self):
        return 0 if self.started[-1] not in self.fails else 2

    def stop(self):
        self.stopped.append(self.started[-1])


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(conduct, 'PERIOD', 0.0)


def grid(out, **after):
    """Returns entries of points of ten steps."""
    return [
        Entry(
            Point(name=name, gin_files=(), bindings={'MODEL_DIR': str(out / name)}, after=needs),
            total_steps=10,
            start_step=0,
            step_flops=5.0,
        )
        for name, needs in after.items()
    ]


def statuses(entries):
    return {entry.point.name: entry.status for entry in entries}


def test_points_run_in_order_and_failures_block_what_needs_them(tmp_path):
    entries = grid(tmp_path, dense=(), bad=(), up=('dense',), worse=('bad',), worst=('worse',))
    launcher, shown = Pretend(fails=('bad',)), []
    conduct.conduct(entries, str(tmp_path), launcher, lambda entries: shown.append(statuses(entries)))
    assert launcher.started == ['dense', 'bad', 'up']
    assert statuses(entries) == {
        'dense': Status.FINISHED,
        'bad': Status.FAILED,
        'up': Status.FINISHED,
        'worse': Status.BLOCKED,
        'worst': Status.BLOCKED,
    }
    assert entries[1].reason == 'NAME = 3 is wrong: make it 4.'
    assert shown[0]['dense'] is Status.RUNNING and shown[0]['up'] is Status.WAITING
    assert launcher.stopped == []
    assert entries[0].progress.metrics == pytest.approx(
        {
            'validation/loss': 2.0,
            'validation/accuracy': 0.5,
            'validation/start_step': 0,
            'validation/seconds': 2.0,
            'validation/flops': 50.0,
        }
    )


def test_as_many_at_once_as_there_are_slots(tmp_path):
    entries = grid(tmp_path, a=(), b=(), c=('a',))
    shown = []
    conduct.conduct(entries, str(tmp_path), Pretend(slots=2), lambda entries: shown.append(statuses(entries)))
    assert [s is Status.RUNNING for s in shown[0].values()] == [True, True, False]
    assert set(statuses(entries).values()) == {Status.FINISHED}


def test_an_interrupted_sweep_ends_its_runs(tmp_path):
    entries = grid(tmp_path, a=())
    launcher = Pretend()

    def interrupt(entries):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conduct.conduct(entries, str(tmp_path), launcher, interrupt)
    assert launcher.stopped == ['a']


def test_time_left_goes_by_flops(tmp_path):
    entries = grid(tmp_path, a=(), b=(), c=())
    assert conduct.seconds_left(entries) is None
    entries[0].status, entries[0].progress = Status.FINISHED, Progress(10, 0, 2.0, 50.0)
    entries[1].status, entries[1].progress = Status.RUNNING, Progress(5, 0, 2.0, 25.0)
    entries[2].start_step = 8
    # 4 seconds for 75 FLOPs; 25 and 10 are left.
    assert conduct.seconds_left(entries) == pytest.approx(35 * 4 / 75)
    entries[0].overhead = 3.0
    assert conduct.seconds_left(entries) == pytest.approx(35 * 4 / 75 + 3)
    assert conduct.seconds_left(entries, slots=2) == pytest.approx((35 * 4 / 75 + 3) / 2)
    assert conduct.seconds_left(entries, slots=8) == conduct.seconds_left(entries, slots=2)


def test_means_of_seeds(tmp_path, capsys):
    entries = grid(tmp_path, a=(), b=(), c=())
    for entry, score in zip(entries, (70.0, 71.0, 72.0), strict=True):
        entry.progress = Progress(10, 0, 1.0, 1.0, {'tasks/average': score, 'tasks/boolq': 2 * score, 'loss': 1.0})
    del entries[0].progress.metrics['tasks/boolq']
    ((name, sample),) = conduct.samples_of(entries, 'tasks/').items()
    assert (name, sample.mean) == ('tasks/average', 71.0) and sample.half_width == pytest.approx(4.302653 / 3**0.5)
    reports.write_means('tasks/', entries, str(tmp_path))
    assert 'tasks/average: 71.0000 ± 2.4841, mean of 3 runs' in capsys.readouterr().out
    assert json.loads((tmp_path / 'means.json').read_text())['tasks/average']['mean'] == 71.0


def test_the_best(tmp_path):
    entries = grid(tmp_path, a=(), b=(), c=())
    for entry, loss in zip(entries, (2.0, 1.0, 0.5), strict=True):
        entry.progress = Progress(10, 0, 1.0, 1.0, {'validation/loss': loss})
    entries[0].status = entries[1].status = Status.FINISHED
    best, value = conduct.best_of(entries, {'metric': 'validation/loss', 'best': 'min'})
    assert (best.point.name, value) == ('b', 1.0)
    assert conduct.best_of(entries, {'metric': 'validation/loss', 'best': 'min', 'among': 'a'})[0].point.name == 'a'
    with pytest.raises(UserError, match='few_shot/10shot'):
        conduct.best_of(entries, {'metric': 'few_shot/10shot', 'best': 'max'})


def test_progress_is_the_last_line_and_the_last_metrics():
    cost = {'start_step': 100, 'seconds': 3.0, 'flops': 7.0}
    lines = [
        {'step': 110, 'split': 'validation', 'loss': 2.0, 'load': [1, 2], **cost},
        {'step': 120, 'split': 'few_shot', '10shot': 0.4, **cost},
        {'step': 130, 'split': 'train', 'loss': 9.0, **cost},
    ]
    progress = progress_of(lines)
    assert (progress.step, progress.start_step, progress.flops) == (130, 100, 7.0)
    assert progress.metrics['validation/loss'] == 2.0 and progress.metrics['few_shot/10shot'] == 0.4
    assert progress_of([]) == Progress()


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with conduct.lock(str(tmp_path)), pytest.raises(UserError, match='another sweep'), conduct.lock(str(tmp_path)):
        pass
    with conduct.lock(str(tmp_path)):
        pass


def sweep_command(out, steps=3):
    bindings = vision.bindings('nowhere', steps, EVAL_STEPS=1, EVAL_PERIOD=100)
    del bindings['MODEL_DIR']
    files = (vision.MODEL, vision.TASK, 'runs/pretrain.gin')
    return [
        'sweep',
        f'--out={out}',
        *(f'--gin_file={file}' for file in files),
        *(f'--gin.{name}={value}' for name, value in bindings.items()),
    ]


def test_a_grid_from_the_command_line(tmp_path, capsys):
    """One of two runs fails; the second sweep keeps the finished run and tries the other again."""
    command = [*sweep_command(tmp_path), '--grid', 'LABEL_SMOOTHING=0.1,0.2']
    good, bad = (tmp_path / f'LABEL_SMOOTHING={value}' for value in (0.1, 0.2))
    bad.write_text('no folder')
    code, out, _ = call(command, capsys)
    assert code == 1
    assert f'{good.name}: finished' in out
    assert f'{bad.name} failed: ' in out and 'repeat the command' in out
    assert read_metrics(str(good / 'metrics.jsonl'))[-1]['step'] == 3
    written = (good / 'metrics.jsonl').stat().st_mtime_ns
    bad.unlink()
    code, out, _ = call(command, capsys)
    assert code == 0 and '2 finished' in out
    assert (good / 'metrics.jsonl').stat().st_mtime_ns == written
    assert read_metrics(str(bad / 'metrics.jsonl'))[-1]['step'] == 3
    record = json.loads((tmp_path / 'sweep.json').read_text())
    assert [point['settings'] for point in record['points']] == [{'LABEL_SMOOTHING': 0.1}, {'LABEL_SMOOTHING': 0.2}]


@pytest.mark.parametrize('chosen', [None, '/elsewhere'])
def test_runs_of_a_grid_share_their_programs(chosen, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    if chosen is not None:
        monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', chosen)

    class Refusing(launchers.Launcher):
        slots = 1

        def start(self, arguments, log):
            raise UserError('enough')

    def make(environment, held, slots):
        seen.append(environment['JAX_COMPILATION_CACHE_DIR'])
        return Refusing()

    monkeypatch.setitem(launchers.LAUNCHERS, 'local', make)
    code, _, error = call([*sweep_command(tmp_path), '--grid=RANDOM_SEED=1,2'], capsys)
    assert code == 2 and 'enough' in error
    assert seen == [chosen or f'{tmp_path}/programs']


def test_print_prints_the_commands(tmp_path, capsys):
    code, out, _ = call([*sweep_command(tmp_path / 'x'), '--grid=RANDOM_SEED=1,2', '--where=print'], capsys)
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 2 and all(line.startswith('upcycle train ') for line in lines)
    assert '--gin.RANDOM_SEED=2' in lines[1] and f'--gin.MODEL_DIR={tmp_path}/x/RANDOM_SEED=2' in lines[1]
    assert os.listdir(tmp_path) == []


MISTAKES = {
    'nothing to sweep': ([], ['--config', '--grid']),
    'both': (['--config=configs/finetune_imagenet.py', '--grid=A=1'], ['--config', '--grid']),
    'a scale of no experiment': (['--scale=mini', '--grid=RANDOM_SEED=1'], ['--scale=mini']),
    'an unused axis': (['--grid=NUM_EXPERTS=2,4'], ['NUM_EXPERTS=2: ', 'is unused']),
    'a value that does not fit': (['--grid=TRAIN_STEPS=2,-1'], ['TRAIN_STEPS=-1: ', 'at least 1']),
    'no such config': (['--config=configs/figure_99.py'], ['figure_99']),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_starts(mistake, tmp_path, capsys):
    more, words = MISTAKES[mistake]
    arguments = sweep_command(tmp_path / 'x')
    if 'TRAIN_STEPS' in str(more):
        arguments = [a for a in arguments if 'TRAIN_STEPS' not in a]
    code, _, error = call([*arguments, *more], capsys)
    assert code == 2
    assert error.startswith('upcycle: ') and 'Traceback' not in error
    assert all(word in error for word in words), error
    assert os.listdir(tmp_path) == []


def test_a_missing_checkpoint_is_found_before_anything_starts(tmp_path, capsys):
    arguments = [a for a in sweep_command(tmp_path / 'x') if 'pretrain' not in a]
    more = ['--gin_file=runs/finetune.gin', '--gin.INITIAL_CHECKPOINT_PATH=/nowhere/at/all', '--grid=RANDOM_SEED=1,2']
    code, _, error = call([*arguments, *more], capsys)
    assert code == 2 and '/nowhere/at/all' in error and 'does not exist' in error
    assert os.listdir(tmp_path) == []


def test_a_folder_with_other_runs_is_refused(tmp_path, capsys):
    dense = vision.dense_checkpoint(str(tmp_path / 'runs'))
    os.makedirs(tmp_path / 'x')
    os.symlink(dense, tmp_path / 'x' / 'RANDOM_SEED=5')
    code, _, error = call([*sweep_command(tmp_path / 'x', 2), '--grid=RANDOM_SEED=5'], capsys)
    assert code == 2 and 'holds another run' in error
    assert os.listdir(tmp_path / 'x') == ['RANDOM_SEED=5']


def test_slots_have_their_own_cores(tmp_path, monkeypatch):
    cores = [set(range(4))]
    monkeypatch.setattr(launchers.os, 'sched_getaffinity', lambda pid: cores[-1], raising=False)
    monkeypatch.setattr(launchers.os, 'sched_setaffinity', lambda pid, new: cores.append(set(new)), raising=False)
    monkeypatch.setattr(launchers.sys, 'executable', '/bin/true')
    with open(tmp_path / 'lock', 'w', encoding='utf-8') as held:
        local = launchers.Local({}, held.fileno(), 2)
        monkeypatch.setattr(launchers.LocalJob, 'poll', lambda self: None)
        started = [local.start(['train'], str(tmp_path / name / 'log.txt')) for name in 'ab']
    assert cores[1::2] == [{0, 2}, {1, 3}] and cores[2::2] == [set(range(4))] * 2
    for job in started:
        job.wait()


def test_a_papers_figure_ends_in_verdicts(tmp_path, monkeypatch, capsys):
    """The report of a figure from handwritten run folders: upcycling starts behind and ends 0.1 ahead."""
    monkeypatch.setattr(Plot, 'png', lambda self: b'')
    what = grids.load('configs/figure_2_language.py', 'mini')
    points = grids.resolve(what, str(tmp_path))
    for point in points:
        branch, seed = os.path.basename(point.name), int(point.name.split('seed_')[1][0])
        end = {'dense': 2.0, 'dense_continuation': 1.5, 'upcycled': 1.4}[branch] + 0.001 * seed * len(branch)
        start = {'dense': 3.0, 'dense_continuation': 2.0, 'upcycled': 2.5}[branch]
        sunk = {} if branch == 'dense' else {'sunk_flops': 100.0, 'sunk_seconds': 1.0}
        lines = [
            {'step': step, 'split': 'validation', 'loss': loss, 'accuracy': 1 / loss, 'flops': flops, 'seconds': flops}
            | {'start_step': 0, **sunk}
            for step, loss, flops in ((0, start, 0.0), (1, (start + end) / 2, 90.0), (2, end, 100.0))
        ]
        os.makedirs(point.model_dir)
        with open(os.path.join(point.model_dir, 'metrics.jsonl'), 'w', encoding='utf-8') as file:
            file.writelines(json.dumps(line) + '\n' for line in lines)
    options = ['report', '--config=configs/figure_2_language.py', '--scale=mini', f'--out={tmp_path}']
    code, out, error = call(options, capsys)
    assert code == 0, error
    folder = tmp_path / 'report' / 'figure_2_language'
    table = (folder / 'claims.md').read_text()
    assert table.count('| holds') == 3 and table in out
    assert 'Claims of the paper' in (folder / 'report.html').read_text()
    assert (folder / 'claims.csv').read_text().count(',holds,') == 3
    # As far as it has come: without the upcycled runs nothing is decided.
    for point in points:
        if point.name.endswith('/upcycled'):
            shutil.rmtree(point.model_dir)
    code, out, error = call(options, capsys)
    assert code == 0 and f'{len(points) * 2 // 3} of {len(points)} runs have begun' in out
    assert '| holds' not in (folder / 'claims.md').read_text()
    shutil.rmtree(tmp_path / 'language_mini')
    code, _, error = call(options, capsys)
    assert code == 2 and 'holds no run of the experiment' in error
    code, _, error = call([*options, str(tmp_path)], capsys)
    assert code == 2 and 'name either run folders, or an experiment' in error


def test_a_grid_of_data_that_is_not_here_is_printed_and_not_run(tmp_path, capsys):
    options = ['sweep', '--config=configs/figure_2_vision.py', '--scale=full', f'--out={tmp_path}']
    code, out, error = call([*options, '--where=print', '--only=vision_b32/seed_1/upcycled'], capsys)
    assert code == 0, error
    made = [line.split('--gin.MODEL_DIR=')[1] for line in out.splitlines()]
    assert made == [f'{tmp_path}/vision_b32/seed_1/{name}' for name in ('dense', 'upcycled')]
    code, _, error = call([*options, '--only=vision_b32/seed_1/*'], capsys)
    assert code == 2 and "TFDS_NAME = 'imagenet21k'" in error
    code, _, error = call([*options, '--where=print', '--gin.BATHC_SIZE=3'], capsys)
    assert code == 2 and 'did you mean BATCH_SIZE' in error
    code, _, error = call([*options, '--where=print', '--only=vision_b33*'], capsys)
    assert code == 2 and '--only=vision_b33* matches no run' in error


def test_programs_are_compiled_once_and_end_in_a_table(tmp_path, monkeypatch, capsys):
    asked = []

    class Compiler:
        def start(self, arguments, log):
            asked.append(arguments)
            path = next(a.removeprefix('--out=') for a in arguments if a.startswith('--out='))
            account = {'topology': 'v4:4x4x4', 'matmul_flops': 2e12, 'arguments': 1e9, 'temporaries': 2e9, 'fits': True}
            wire = {'all-to-all': {'count': 48, 'wire_bytes': 1.5e9}, 'all-reduce': {'count': 3, 'wire_bytes': 1e9}}
            with open(path, 'w', encoding='utf-8') as file:
                json.dump({**account, 'collectives': wire, 'estimated_core_days': 12.3}, file)
            return self

        def poll(self):
            return 0

        def stop(self):
            pass

    monkeypatch.setitem(launchers.LAUNCHERS, 'local', lambda environment, held, slots: Compiler())
    options = ['--config=configs/figure_5.py', '--scale=compiled', f'--out={tmp_path}']
    for _ in range(2):
        code, out, _ = call(['sweep', *options], capsys)
        assert code == 0
        assert '| language_base/upcycled | v4:4x4x4 | 2.0 | 1.0 + 2.0 | yes | 48, 1.50 | 1.00 | 12 |' in out
    assert len(asked) == 3 and all(a[0] == 'compile' and '--gin_file=tasks/synthetic_text.gin' in a for a in asked)
    code, out, _ = call(['sweep', *options, '--where=print'], capsys)
    assert code == 0 and out.count('upcycle compile --topology=v4:4x4x4') == 3


def test_points_are_jobs_of_a_cluster(tmp_path, monkeypatch):
    """submitit's own local cluster stands in for Slurm."""
    monkeypatch.setattr(launchers.Slurm, 'python', '/bin/echo')
    slurm = launchers.make('slurm', {'JAX_PLATFORMS': 'tpu'}, 0, 2, {'cluster': 'local', 'timeout_min': 2})
    assert slurm.slots == 2
    log = str(tmp_path / 'logs' / 'a.txt')
    assert conduct.run_to_end(slurm, ['train', '--gin.NAME=a b'], log) == 0
    assert '-m upcycle train --gin.NAME=a b\n' in (tmp_path / 'logs' / 'a.txt').read_text()
    monkeypatch.setattr(launchers.Slurm, 'python', '/bin/false')
    assert conduct.run_to_end(slurm, ['train'], str(tmp_path / 'logs' / 'b.txt')) == 1


SBATCH = """#!/usr/bin/env bash
cp "${{@: -1}}" {folder}/$(ls {folder} | wc -l).sh
echo Submitted batch job 42
"""


def test_points_that_start_together_are_an_array_of_slurm(tmp_path, monkeypatch):
    """Fake Slurm programs that keep the submitted scripts."""
    programs, scripts = tmp_path / 'bin', tmp_path / 'scripts'
    programs.mkdir()
    scripts.mkdir()
    for name, body in {
        'sbatch': SBATCH.format(folder=scripts),
        'srun': '#!/bin/sh\n',
        'scancel': '#!/bin/sh\n',
    }.items():
        (programs / name).write_text(body)
        (programs / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{programs}{os.pathsep}{os.environ["PATH"]}')
    slurm = launchers.make('slurm', {}, 0, 8, {'slurm_partition': 'a100', 'timeout_min': 2})
    logs = [str(tmp_path / 'logs' / f'seed_{i}' / 'run.txt') for i in range(3)]
    jobs = list(slurm.start_all([(['train', f'--gin.SEED={i}'], log) for i, log in enumerate(logs)]))
    assert len(jobs) == 3
    (script,) = scripts.iterdir()
    assert '#SBATCH --array=0-2%3\n' in script.read_text() and '--partition=a100' in script.read_text()
    # One alone is a job.
    slurm.start(['train'], logs[0])
    assert sum('--array' in script.read_text() for script in scripts.iterdir()) == 1
    assert len(list(scripts.iterdir())) == 2


XPK = """#!/usr/bin/env bash
printf '%s\\n' "$@" -- >> {folder}/calls.txt
case "$*" in *--wait-for-job-completion=*) exit $(cat {folder}/status) ;; esac
"""


def test_points_are_workloads_of_a_gke_cluster(tmp_path, monkeypatch):
    """A fake xpk that records its arguments."""
    (tmp_path / 'xpk').write_text(XPK.format(folder=tmp_path))
    (tmp_path / 'xpk').chmod(0o755)
    options = {'cluster': 'c', 'tpu-type': 'v4-128', 'docker-image': 'i', 'zone': 'z'}
    with pytest.raises(UserError, match='needs xpk'):
        launchers.make('gke', {}, 0, 1, options)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    with pytest.raises(UserError, match='--cluster tpu-type='):
        launchers.make('gke', {}, 0, 1, {'cluster': 'c'})
    gke = launchers.make('gke', dict(os.environ), 0, 2, options)
    names = []
    for status in (0, 125):
        (tmp_path / 'status').write_text(str(status))
        (tmp_path / 'calls.txt').write_text('')
        log = str(tmp_path / 'logs' / 'a.txt')
        assert conduct.run_to_end(gke, ['train', '--gin.NAME=a b'], log) == status
        create, watch, *rest = [c.strip().split('\n') for c in (tmp_path / 'calls.txt').read_text().split('--\n') if c]
        assert {'--tpu-type=v4-128', '--restart-on-exit-codes=69,75', '--zone=z'} <= set(create)
        assert create[-1] == "--command=upcycle train '--gin.NAME=a b' --distributed"
        assert watch[:4] == ['workload', 'list', '--cluster=c', '--zone=z']
        # A workload that failed makes room for the next try.
        assert [call[:2] for call in rest] == ([['workload', 'delete']] if status else [])
        names.append(create[2])
    assert names[0] == names[1] and len(names[0]) < 45


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        (['--cluster', 'a=1'], '--cluster a=... goes with --where=slurm or gke'),
        (['--cluster', 'a'], 'must look like'),
        (['--jobs=0'], '--jobs=0'),
    ],
)
def test_bad_options(options, match, tmp_path, capsys):
    code, _, err = call(
        ['sweep', '--config=configs/finetune_imagenet.py', '--scale=mini', f'--out={tmp_path}', *options], capsys
    )
    assert code == 2 and match in err


def test_an_unknown_option_of_the_cluster(tmp_path):
    slurm = launchers.make('slurm', {}, 0, 1, {'cluster': 'local', 'colour': 'red'})
    with pytest.raises(UserError, match='--cluster options: .*colour'):
        slurm.start(['train'], str(tmp_path / 'a.txt'))


@pytest.mark.parametrize('kind', [list, tuple])
def test_a_point_that_starts_from_several_checkpoints(kind, tmp_path):
    """Its first step is the largest step of the checkpoints; a checkpoint without a step counts as 0."""
    tree = trees.t5(False, state=False)
    first = trees.write(tmp_path / 'first', 't5x_orbax', tree)
    second = trees.write(tmp_path / 'second', 't5x_orbax', {**tree, 'step': np.asarray(7, np.int32)})
    run = types.SimpleNamespace(initial_checkpoint_path=kind([str(first), str(second)]), dense_step=None)
    point, seen = types.SimpleNamespace(after=()), {}
    assert conduct._start(run, point, {}, seen) == int(tree['step'])
    assert conduct._start(run, point, {}, seen) == int(tree['step']) and len(seen) == 1
    run.initial_checkpoint_path = str(second)
    assert conduct._start(run, point, {}, seen) == 7
