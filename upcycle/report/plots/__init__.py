"""The report's figures.

`figure.py` saves panels, `axes.py` and `lines.py` have what panels share. The panels: `quality.py` against cost, `steps.py` over
steps, `experts.py` of MoE layers, `ends.py` of first and last values.
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
    """Everything after the main figures: before training, the initial drop, scratch from zero, experts, schedule, throughput."""
    return [
        *step_zero_plot(reports),
        *drop_plot(reports),
        *from_zero_plot(reports),
        *expert_plots(reports),
        schedule_plot(reports),
        throughput_plot(reports),
    ]
