"""What all runs of one model at one scale have in common; those of the paper's models are files of `configs/settings/`."""

import dataclasses
import enum
import types
from collections.abc import Mapping
from typing import Any

from upcycle.errors import UserError
from upcycle.sweep import grid

# Of the dense run, evenly spaced: where branches can start.
NUM_CHECKPOINTS = 10


class Scale(enum.StrEnum):
    """How large an experiment is."""

    MINI = 'mini'
    COMPILED = 'compiled'
    FULL = 'full'


def scale_of(name: str) -> Scale:
    """The scale of that name.

    Raises:
      UserError: there is none.
    """
    grid.one_of_scales(name, *Scale)
    return Scale(name)


@dataclasses.dataclass(frozen=True)
class Pod:
    """A TPU slice, and the meshes on it.

    Attributes:
      topology: of `upcycle compile`.
      bindings: of every run.
      sparse: more bindings, of runs with MoE layers.
    """

    topology: str
    bindings: Mapping[str, Any]
    sparse: Mapping[str, Any]


# The paper's: 64 chips of TPU v4, and 256 with 4-way model parallelism.
POD = Pod('v4:4x4x4', {'MESH_SHAPE': (64, 1, 1)}, {'MESH_SHAPE': (2, 32, 1), 'GROUPS_MULTIPLE_OF': 64})
FOUR_WAY_POD = Pod('v4:4x8x8', {'MESH_SHAPE': (64, 1, 4)}, {'MESH_SHAPE': (2, 32, 4), 'GROUPS_MULTIPLE_OF': 64})


@dataclasses.dataclass(frozen=True)
class Downstream:
    """What the models of a setting are fine-tuned on.

    Attributes:
      name: of the runs.
      task, run: gin files.
      files: gin files after the settings.
      bindings: of every run, after the setting's own; those of schedules and periods count steps of fine-tuning.
      sparse: more bindings, of models with MoE layers.
      metric: by which models are compared, 'SPLIT/NAME' or of validation.
    """

    name: str
    task: str
    run: str
    bindings: Mapping[str, Any]
    metric: str
    files: tuple[str, ...] = ()
    sparse: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of one model at one scale have in common.

    Attributes:
      name: the folder of its runs.
      model, moe, task: gin files.
      shapes: a task with batches of the same shapes that needs no data; '': `task` needs none.
      settings: gin files after that of the run.
      bindings: of every run. (The dense run keeps `NUM_CHECKPOINTS` checkpoints.)
      sparse: more bindings, of runs with MoE layers.
      dense_steps: of the shared dense run.
      dense_checkpoint: where branches start instead, as many steps old; None: at the dense run.
      extra_steps: of plain upcycling at a budget of 1; those of every other branch follow from equal FLOPs.
      cooldown_steps: at the end of every branch.
      topology: of the compiled scale.
      num_experts, num_layers: of plain upcycling, and of a stack of the model.
      ablation: bindings of plain upcycling in the paper's ablations of this model, and its label there.
      end_metrics: of validation, or 'SPLIT/NAME': what plots of the ends of runs show.
      downstream: what its models are fine-tuned on.
    """

    name: str
    model: str
    moe: str
    task: str
    shapes: str = ''
    settings: tuple[str, ...] = ()
    bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sparse: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dense_steps: int
    dense_checkpoint: str | None = None
    extra_steps: int
    cooldown_steps: int = 0
    topology: str = ''
    num_experts: int
    num_layers: int
    ablation: tuple[Mapping[str, Any], str] = dataclasses.field(default_factory=lambda: ({}, 'upcycled'))
    end_metrics: tuple[str, ...] = ('loss', 'accuracy')
    downstream: Downstream


def setting_of(kind: str, scale: Scale, size: str | None = None) -> Setting:
    """The setting of a model.

    Args:
      kind: names a file of `configs/settings/`.
      scale: how large.
      size: one of the file's `SIZES`; None: its default. Of the mini scale there is only one.

    Raises:
      UserError: there is no such file.
    """
    return _module(kind).get_setting(scale, size)


def every_size(kind: str, scale: Scale) -> list[Setting]:
    """The setting of each size of a model; see `setting_of`."""
    sizes = (None,) if scale is Scale.MINI else _module(kind).SIZES
    return [setting_of(kind, scale, size) for size in sizes]


def _module(kind: str) -> types.ModuleType:
    path = f'configs/settings/{kind}.py'
    file = grid.find(path)
    if file is None:
        raise UserError(f'{path} does not exist: there are no settings of {kind} models.')
    return grid.executed(file)
