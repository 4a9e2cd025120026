"""Numbers of steps at which all branches of a panel spend the same FLOPs."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle import configuration, cost
from upcycle.sweep import grid
from upcycle.sweep.paper.branch import CONTINUATION, UPCYCLED, Branch
from upcycle.sweep.paper.setting import NUM_CHECKPOINTS, Setting


def steps_of(setting: Setting, branch: Branch) -> tuple[int, int]:
    """Returns the number of steps of a branch, and the step of the dense run at which it starts."""
    budget = branch.budget * setting.extra_steps * step_flops(setting, UPCYCLED)
    if branch.with_dense:
        budget += setting.dense_steps * step_flops(setting, CONTINUATION)
    checkpoints = branch.start * NUM_CHECKPOINTS
    assert abs(checkpoints - round(checkpoints)) < 1e-6, (
        f'there is no checkpoint at {branch.start:.0%} of the dense run'
    )
    start = 0 if branch.run == 'scratch' else round(checkpoints) * (setting.dense_steps // NUM_CHECKPOINTS)
    return max(round(budget / step_flops(setting, branch)), 1), start


def step_flops(setting: Setting, branch: Branch) -> float:
    """Returns the FLOPs of a training step."""
    return flops_of(branch.files_in(setting, setting.shapes or None), branch.bindings_in(setting))


def flops_of(gin_files: Sequence[str], bindings: Mapping[str, Any]) -> float:
    """Returns the FLOPs of a training step of a run; MODEL_DIR, TRAIN_STEPS and INITIAL_CHECKPOINT_PATH may be missing."""
    return _cached(tuple(gin_files), tuple(sorted((name, grid.text_of(value)) for name, value in bindings.items())))


@functools.cache
def _cached(files: tuple[str, ...], bindings: tuple[tuple[str, str], ...]) -> float:
    named = {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '1000000', **dict(bindings)}
    if not {'runs/pretrain.gin', 'runs/scratch.gin'} & set(files):
        named['INITIAL_CHECKPOINT_PATH'] = 'unused'
    run = configuration.load(files, named)
    return cost.step_flops(run.model, run.train_data.batch_spec())
