"""Settings: what all runs of a model at one scale share. The paper's settings are files of `configs/settings/`."""

import dataclasses
import enum
import types
from collections.abc import Mapping
from typing import Any

from upcycle.errors import UserError
from upcycle.sweep import grid

# Evenly spaced checkpoints of the dense run, from which branches can start.
NUM_CHECKPOINTS = 10


class Scale(enum.StrEnum):
    """How large an experiment is."""

    MINI = 'mini'
    COMPILED = 'compiled'
    FULL = 'full'


def scale_of(name: str) -> Scale:
    """Returns a scale by name.

    Raises:
      UserError: the name is unknown.
    """
    grid.one_of_scales(name, *Scale)
    return Scale(name)


@dataclasses.dataclass(frozen=True)
class Pod:
    """A TPU slice and the meshes on it.

    Attributes:
      topology: the --topology of `upcycle compile`.
      bindings: bindings of every run.
      sparse: further bindings of runs with MoE layers.
    """

    topology: str
    bindings: Mapping[str, Any]
    sparse: Mapping[str, Any]


# The paper's slices: 64 chips of TPU v4, and 256 chips with 4-way model parallelism.
POD = Pod('v4:4x4x4', {'MESH_SHAPE': (64, 1, 1)}, {'MESH_SHAPE': (2, 32, 1), 'GROUPS_MULTIPLE_OF': 64})
FOUR_WAY_POD = Pod('v4:4x8x8', {'MESH_SHAPE': (64, 1, 4)}, {'MESH_SHAPE': (2, 32, 4), 'GROUPS_MULTIPLE_OF': 64})


@dataclasses.dataclass(frozen=True)
class Downstream:
    """The fine-tuning of the models of a setting.

    Attributes:
      name: part of the names of the runs.
      task, run: the gin file of the task, and the name of a file in `gin/runs/`.
      files: gin files included after those of the setting.
      bindings: bindings of every run, after the setting's; schedules and periods count steps of fine-tuning.
      sparse: further bindings of models with MoE layers.
      metric: the compared metric: a validation metric, or 'SPLIT/NAME'.
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
    """What all runs of a model at one scale share.

    Attributes:
      name: folder of the runs.
      model, moe, task: gin files.
      shapes: a task that needs no data and has the same batch shapes as `task`; '': `task` itself needs no data.
      settings: gin files included after that of the run.
      bindings: bindings of every run. (The dense run keeps `NUM_CHECKPOINTS` checkpoints.)
      sparse: further bindings of runs with MoE layers.
      dense_steps: steps of the shared dense run.
      dense_checkpoint: a public checkpoint after `dense_steps` that replaces the dense run; None: none.
      extra_steps: steps of plain upcycling at a budget of 1; those of all other branches follow from equal FLOPs.
      cooldown_steps: steps of cooldown at the end of every branch.
      topology: TPU topology of the compiled scale.
      num_experts, num_layers: experts of plain upcycling, and layers of one stack of the model.
      ablation: bindings and label of plain upcycling in the paper's ablations of this model.
      end_metrics: metrics in plots of final values: validation metrics, or 'SPLIT/NAME'.
      downstream: the fine-tuning of its models.
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
    """Returns the setting of a model.

    Args:
      kind: name of a file in `configs/settings/`, without the suffix.
      scale: the scale.
      size: one of the file's `SIZES`; None: its default. The mini scale has a single size.

    Raises:
      UserError: the file does not exist.
    """
    return _module(kind).get_setting(scale, size)


def every_size(kind: str, scale: Scale) -> list[Setting]:
    """Returns the settings of all sizes of a model; see `setting_of`."""
    sizes = (None,) if scale is Scale.MINI else _module(kind).SIZES
    return [setting_of(kind, scale, size) for size in sizes]


def _module(kind: str) -> types.ModuleType:
    path = f'configs/settings/{kind}.py'
    file = grid.find(path)
    if file is None:
        raise UserError(f'{path} does not exist: {kind!r} is an unknown kind of setting.')
    return grid.executed(file)
