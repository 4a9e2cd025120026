"""The runs of a comparison, all of which start from one dense run or from nothing."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from upcycle.report.runs import Role
from upcycle.sweep.paper.setting import Setting


@dataclasses.dataclass(frozen=True)
class Branch:
    """A run of a comparison.

    Attributes:
      run: its file of `gin/runs/`, without the suffix.
      files: gin files after the settings.
      bindings: its own.
      role: in the report.
      budget: FLOPs, as a multiple of plain upcycling's.
      with_dense: whether it gets the dense run's FLOPs as well, as a run from nothing does.
      start: share of the dense run after which it begins, a multiple of 1 / `NUM_CHECKPOINTS`.
      moe: whether it has MoE layers.
    """

    run: str = 'upcycle'
    files: tuple[str, ...] = ()
    bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    role: Role = Role.UPCYCLED
    budget: float = 1.0
    with_dense: bool = False
    start: float = 1.0
    moe: bool = True

    def bindings_in(self, setting: Setting) -> dict[str, Any]:
        """Its bindings after those of a setting; steps, seeds and checkpoints aside."""
        return {**setting.bindings, **(setting.sparse if self.moe else {}), **self.bindings}

    def files_in(self, setting: Setting, task: str | None = None) -> list[str]:
        """Its gin files in a setting, in the order of inclusion; `task` in the place of the setting's."""
        moe = [setting.moe] if self.moe else []
        run = f'runs/{self.run}.gin'
        return [setting.model, *moe, task or setting.task, run, *setting.settings, *self.files]


UPCYCLED = Branch()
CONTINUATION = Branch(run='continue_dense', role=Role.DENSE_CONTINUATION, moe=False)
SCRATCH = Branch(run='scratch', role=Role.SCRATCH, with_dense=True)
DENSE = Branch(run='pretrain', role=Role.DENSE, moe=False)


def upcycled(*files: str, budget: float = 1.0, start: float = 1.0, **bindings: Any) -> Branch:
    """Plain upcycling but for these files and bindings."""
    return dataclasses.replace(UPCYCLED, files=files, bindings=bindings, budget=budget, start=start)


def continuation(*, budget: float = 1.0, start: float = 1.0) -> Branch:
    """The dense continuation, but for its budget and where it starts."""
    return dataclasses.replace(CONTINUATION, budget=budget, start=start)


def from_scratch(**bindings: Any) -> Branch:
    """MoE from scratch on the dense run's FLOPs alone."""
    return dataclasses.replace(SCRATCH, budget=0.0, bindings=bindings)


def capacity(factor: float) -> dict[str, float]:
    """Bindings of a capacity factor."""
    return {'TRAIN_EXPERT_CAPACITY_FACTOR': factor, 'EVAL_EXPERT_CAPACITY_FACTOR': factor}


def experts(count: int, setting: Setting) -> dict[str, int]:
    """Bindings of a number of experts; none where plain upcycling has as many, so that it is the same run."""
    return {} if count == setting.num_experts else {'NUM_EXPERTS': count}


def of_experts(count: int, plain: str, setting: Setting) -> str:
    """The label of plain upcycling with a number of experts."""
    return plain if count == setting.num_experts else f'{plain}, E={count}'


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r'[^\w.=-]+', '_', label)
