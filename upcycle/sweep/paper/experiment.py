"""Experiments: the points and reports of panels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from upcycle.report.runs import Role
from upcycle.sweep.paper.branch import CONTINUATION, DENSE, Branch, slug
from upcycle.sweep.paper.panel import Panel
from upcycle.sweep.paper.programs import programs
from upcycle.sweep.paper.setting import NUM_CHECKPOINTS, Scale, Setting
from upcycle.sweep.paper.steps import step_flops, steps_of

Point = dict[str, Any]
# The base of the comparison at several budgets is the first of these branches that a panel has.
_BASES = ('dense continuation', 'upcycled', 'cf=1')


def experiment(
    name: str, scale: Scale | str, panels: Sequence[Panel], seeds: Iterable[int] = (0, 1, 2)
) -> ml_collections.ConfigDict:
    """Makes the config of an experiment.

    Args:
      name: name of its folder.
      scale: at 'compiled' the config has programs to compile, at the other scales runs and reports.
      panels: the comparisons.
      seeds: seeds of initialisation, data order and surgery; they pair the runs.
    """
    config = ml_collections.ConfigDict({'name': name})
    if scale == Scale.COMPILED:
        config.compile = programs(panels)
        return config
    points: dict[str, Point] = {}
    config.reports = []
    for number, panel in enumerate(panels):
        groups = []
        for seed in seeds if panel.seeds is None else panel.seeds:
            made = _points(panel, seed)
            points |= {point['name']: point for point in made.values()}
            if panel.downstream is not None:
                made = _fine_tuned(panel, made)
                points |= {point['name']: point for point in made.values()}
            groups.append({label: [point['name']] for label, point in made.items()})
        # Experiments can share --out, so the folder has the name of the experiment.
        folder = name if len(panels) == 1 else f'{name}/{number + 1}_{panel.setting.name}'
        config.reports.append(_report(panel, folder, groups))
    config.points = list(points.values())
    return config


def _report(panel: Panel, folder: str, groups: list[dict[str, list[str]]]) -> dict[str, Any]:
    """Returns one of an experiment's `reports`; see `upcycle.sweep.grid`."""
    dense = Role.DENSE if panel.downstream is None else Role.OTHER
    return {
        'name': folder,
        'title': panel.title,
        'groups': groups,
        'roles': {label: branch.role.value for label, branch in panel.branches.items()} | {'dense': dense.value},
        'curves': None if panel.curves is None else ['dense', *panel.curves],
        'base': next((label for label in _BASES if label in panel.branches), None),
        'claims': panel.claims,
        'finals': panel.finals,
        'numbers': panel.numbers,
    }


def _points(panel: Panel, seed: int) -> dict[str, Point]:
    """Returns the dense run and its branches for one seed, by label."""
    setting = panel.setting
    dense = _dense_point(setting, seed)
    made = {'dense': dense} if setting.dense_checkpoint is None else {}
    return made | {
        label: _branch_point(setting, label, branch, seed, dense['name']) for label, branch in panel.branches.items()
    }


def _dense_point(setting: Setting, seed: int) -> Point:
    bindings = {
        **DENSE.bindings_in(setting),
        **_seeds(seed),
        'TRAIN_STEPS': setting.dense_steps,
        'CHECKPOINT_PERIOD': setting.dense_steps // NUM_CHECKPOINTS,
        'CHECKPOINT_KEEP': None,
    }
    return _point(_name(setting, seed, 'dense'), 'dense', DENSE.files_in(setting), bindings)


def _branch_point(setting: Setting, label: str, branch: Branch, seed: int, dense: str) -> Point:
    steps, start = steps_of(setting, branch)
    bindings = {**setting.bindings, **_seeds(seed), **branch.bindings_in(setting), 'TRAIN_STEPS': steps + start}
    if setting.cooldown_steps:
        bindings['COOLDOWN_STEPS'] = min(setting.cooldown_steps, steps // 2)
    if branch.run == 'upcycle':
        bindings['UPCYCLE_SEED'] = seed
    point = _point(_name(setting, seed, label), label, branch.files_in(setting), bindings)
    if branch.run == 'scratch':
        return point
    if setting.dense_checkpoint is not None:
        assert start == setting.dense_steps, f'{label} must start at {setting.dense_checkpoint}'
        bindings['INITIAL_CHECKPOINT_PATH'] = setting.dense_checkpoint
        bindings['DENSE_FLOPS'] = setting.dense_steps * step_flops(setting, CONTINUATION)
        return point
    point['start'] = dense
    if start != setting.dense_steps:
        point['checkpoints'] = [start]
    return point


def _fine_tuned(panel: Panel, made: Mapping[str, Point]) -> dict[str, Point]:
    """Returns the fine-tuning of every run of one seed, by label."""
    setting, downstream = panel.setting, panel.downstream
    points = {}
    for label, point in made.items():
        branch = panel.branches.get(label, DENSE)
        bindings = {
            **setting.bindings,
            **{name: point['bindings'][name] for name in _seeds(0)},
            **branch.bindings_in(setting),
            **downstream.bindings,
            **(downstream.sparse if branch.moe else {}),
        }
        tuning = Branch(run=downstream.run, files=downstream.files, moe=branch.moe)
        files = tuning.files_in(setting, downstream.task)
        name = f'{point["name"]}_on_{downstream.name}'
        points[label] = {**_point(name, label, files, bindings), 'start': point['name']}
    return points


def _point(name: str, label: str, files: list[str], bindings: dict[str, Any]) -> Point:
    return {'name': name, 'gin_files': files, 'bindings': bindings, 'settings': {'branch': label}}


def _name(setting: Setting, seed: int, label: str) -> str:
    return f'{setting.name}/seed_{seed}/{slug(label)}'


def _seeds(seed: int) -> dict[str, int]:
    return {'RANDOM_SEED': seed, 'DATA_SEED': seed}
