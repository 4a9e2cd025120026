"""The runs of a comparison: each starts from the dense run or from scratch."""

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
      run: name of a file in `gin/runs/`, without the suffix.
      files: gin files included after those of the setting.
      bindings: bindings of this branch.
      role: role in the report.
      budget: FLOPs, as a multiple of those of plain upcycling.
      with_dense: whether the budget also includes the dense run's FLOPs, as for a run from scratch.
      start: share of the dense run after which the branch starts, a multiple of 1 / `NUM_CHECKPOINTS`.
      moe: whether the model has MoE layers.
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
        """Returns all bindings in a setting, except steps, seeds and checkpoints."""
        return {**setting.bindings, **(setting.sparse if self.moe else {}), **self.bindings}

    def files_in(self, setting: Setting, task: str | None = None) -> list[str]:
        """Returns the gin files in a setting, in the order of inclusion. `task` replaces the setting's task."""
        moe = [setting.moe] if self.moe else []
        run = f'runs/{self.run}.gin'
        return [setting.model, *moe, task or setting.task, run, *setting.settings, *self.files]


UPCYCLED = Branch()
CONTINUATION = Branch(run='continue_dense', role=Role.DENSE_CONTINUATION, moe=False)
SCRATCH = Branch(run='scratch', role=Role.SCRATCH, with_dense=True)
DENSE = Branch(run='pretrain', role=Role.DENSE, moe=False)


def upcycled(*files: str, budget: float = 1.0, start: float = 1.0, **bindings: Any) -> Branch:
    """Returns plain upcycling with other files, bindings, budget or start."""
    return dataclasses.replace(UPCYCLED, files=files, bindings=bindings, budget=budget, start=start)


def continuation(*, budget: float = 1.0, start: float = 1.0) -> Branch:
    """Returns the dense continuation with another budget or start."""
    return dataclasses.replace(CONTINUATION, budget=budget, start=start)


def from_scratch(**bindings: Any) -> Branch:
    """Returns MoE from scratch with only the dense run's FLOPs."""
    return dataclasses.replace(SCRATCH, budget=0.0, bindings=bindings)


def capacity(factor: float) -> dict[str, float]:
    """Returns the bindings of a capacity factor."""
    return {'TRAIN_EXPERT_CAPACITY_FACTOR': factor, 'EVAL_EXPERT_CAPACITY_FACTOR': factor}


def experts(count: int, setting: Setting) -> dict[str, int]:
    """Returns the bindings of a number of experts; none for that of plain upcycling, so that it is the same run."""
    return {} if count == setting.num_experts else {'NUM_EXPERTS': count}


def of_experts(count: int, plain: str, setting: Setting) -> str:
    """Returns the label of plain upcycling with a number of experts."""
    return plain if count == setting.num_experts else f'{plain}, E={count}'


def slug(label: str) -> str:
    """Turns a label into the name of a folder."""
    return re.sub(r'[^\w.=-]+', '_', label)
