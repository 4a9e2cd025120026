"""The runs of the paper's figures and tables, for the experiments of `configs/`, at three scales.

  mini      the quickstarts' models on embedded data: minutes per run on two CPU cores
  full      the paper's models, data (public data where the paper's is private) and meshes
  compiled  the programs of `full`, compiled for their TPU topology but not run

Runs are named after model, seed and branch, not after a figure: `language_mini/seed_0/upcycled`. Experiments with the same --out
share their runs.

`setting.py` describes models (the paper's are files of `configs/settings/`), `branch.py` the runs of a comparison, `panel.py`
comparisons with their claims, `steps.py` numbers of steps at equal FLOPs; `experiment.py` and `programs.py` make the configs.
"""

# ruff: noqa: F401
# The names that the files of `configs/` use.
from upcycle.report.runs import Role
from upcycle.sweep.paper.branch import (
    CONTINUATION,
    SCRATCH,
    UPCYCLED,
    Branch,
    capacity,
    continuation,
    experts,
    from_scratch,
    of_experts,
    upcycled,
)
from upcycle.sweep.paper.experiment import experiment
from upcycle.sweep.paper.panel import Panel
from upcycle.sweep.paper.setting import (
    FOUR_WAY_POD,
    POD,
    Downstream,
    Pod,
    Scale,
    Setting,
    every_size,
    scale_of,
    setting_of,
)
