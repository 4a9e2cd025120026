"""The programs of an experiment's runs, to be compiled instead of run."""

from collections.abc import Sequence
from typing import Any

from upcycle.sweep import grid
from upcycle.sweep.paper.branch import DENSE, Branch, slug
from upcycle.sweep.paper.panel import Panel
from upcycle.sweep.paper.steps import steps_of

# Bindings that do not change the training step.
_NOT_IN_PROGRAM = {
    'EVAL_PERIOD',
    'CHECKPOINT_PERIOD',
    'CHECKPOINT_KEEP',
    'OPTIMIZER_STATE',
    'EXPERT_OPERATOR',
    'RANDOM_COPIED',
    'NOISE_STDDEV',
    'NOISE_FRACTION',
    'STEP_0_CAPACITY_FACTORS',
    'EVAL_EXPERT_CAPACITY_FACTOR',
}


def programs(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Returns the distinct programs of an experiment: branches that only differ in their start share one."""
    distinct: dict[tuple[Any, ...], dict[str, Any]] = {}
    for panel in panels:
        for label, branch in {'dense': DENSE, **panel.branches}.items():
            program = _program(panel, label, branch)
            bindings = {k: grid.text_of(v) for k, v in program['bindings'].items() if k != 'TRAIN_STEPS'}
            distinct.setdefault((tuple(program['gin_files']), tuple(sorted(bindings.items()))), program)
    return list(distinct.values())


def _program(panel: Panel, label: str, branch: Branch) -> dict[str, Any]:
    setting, tuning = panel.setting, panel.downstream
    name = f'{setting.name}/{slug(label)}'
    bindings = branch.bindings_in(setting)
    if tuning is None:
        files = tuple(file for file in branch.files if not file.startswith('surgery/'))
        gin_files = Branch(run='scratch' if branch.moe else 'pretrain', files=files, moe=branch.moe).files_in(setting)
        bindings['TRAIN_STEPS'] = setting.dense_steps if label == 'dense' else steps_of(setting, branch)[0]
    else:
        name = f'{name}_on_{tuning.name}'
        gin_files = Branch(run=tuning.run, files=tuning.files, moe=branch.moe).files_in(setting, tuning.task)
        bindings |= {**tuning.bindings, **(tuning.sparse if branch.moe else {})}
        bindings['INITIAL_CHECKPOINT_PATH'] = 'unused'
    bindings = {name: value for name, value in bindings.items() if name not in _NOT_IN_PROGRAM}
    return {'name': name, 'gin_files': gin_files, 'bindings': bindings, 'topology': setting.topology}
