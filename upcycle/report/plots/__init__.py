"""The report's figures.

`figure.py` renders panels; `axes.py` and `lines.py` are parts that panels share. The panels: `quality.py` (metrics against cost),
`steps.py` (values over steps), `experts.py` (MoE layers), `ends.py` (first and last values).
"""

from collections.abc import Sequence

from upcycle.report.compare import Report
from upcycle.report.plots.ends import Final, final_plot, step_zero_plot
from upcycle.report.plots.experts import expert_plots
from upcycle.report.plots.figure import Plot
from upcycle.report.plots.quality import drop_plot, from_zero_plot, main_plots
from upcycle.report.plots.steps import schedule_plot, throughput_plot

__all__ = [
    'Final',
    'Plot',
    'final_plot',
    'main_plots',
    'other_plots',
]


def other_plots(reports: Sequence[Report]) -> list[Plot]:
    """Returns all other plots: step 0, the initial drop, MoE from scratch, experts, schedule and throughput."""
    return [
        *step_zero_plot(reports),
        *drop_plot(reports),
        *from_zero_plot(reports),
        *expert_plots(reports),
        schedule_plot(reports),
        throughput_plot(reports),
    ]
