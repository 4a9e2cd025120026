"""The runs of the paper's figures and tables, for the experiments of `configs/`, at three scales.

  mini      the quickstarts' models on embedded data, minutes a run on two CPU cores
  full      the paper's models, data (public where the paper's is private) and meshes
  compiled  the programs of `full`, compiled for their TPU topology and not run

A run is named after its model, seed and branch and not after a figure: `language_mini/seed_0/upcycled`. Experiments that share
--out share their runs.

`setting.py` describes models (those of the paper are files of `configs/settings/`), `branch.py` runs of a comparison, `panel.py`
comparisons with their claims, `steps.py` numbers of steps at equal FLOPs; `experiment.py` and `programs.py` make configs of them.
"""

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

__all__ = [
    'CONTINUATION',
    'FOUR_WAY_POD',
    'POD',
    'SCRATCH',
    'UPCYCLED',
    'Branch',
    'Downstream',
    'Panel',
    'Pod',
    'Role',
    'Scale',
    'Setting',
    'capacity',
    'continuation',
    'every_size',
    'experiment',
    'experts',
    'from_scratch',
    'of_experts',
    'scale_of',
    'setting_of',
    'upcycled',
]
