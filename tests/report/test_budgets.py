"""Branches at several budgets, and chained runs."""

import io
import pathlib

import matplotlib.figure
import pytest
from PIL import Image

from upcycle.report.budgets import as_markdown, as_plot, at_budgets
from upcycle.report.compare import compare_seeds
from upcycle.report.plots.axes import name_lines
from upcycle.report.plots.figure import DPI
from upcycle.report.runs import Axis, Role, Run, chain

STEPS = range(0, 101, 2)


def run(name, loss, role=Role.UPCYCLED, steps=STEPS, step_flops=1.0, start_step=1000, sunk=500.0):
    """Returns a run that logs `loss(flops)`."""
    records = tuple(
        {
            'split': 'validation',
            'step': start_step + step,
            'loss': loss(step * step_flops),
            'accuracy': 0.5,
            'flops': step * step_flops,
            'seconds': float(step),
            'start_step': start_step,
            'sunk_flops': sunk,
            'sunk_seconds': 1.0,
        }
        for step in steps
    )
    return Run(name, pathlib.Path(name), role, records)


def seeds(*gaps):
    return [
        {
            'copy': run('copy', lambda x: 2 - 0.01 * x),
            # Behind at first, ahead in the end; half as many steps of twice the cost.
            'drop': run(
                'drop', lambda x, gap=gap: 2 - 0.01 * x + gap - 0.002 * x, steps=range(0, 51, 2), step_flops=2.0
            ),
            'short': run('short', lambda x: 2.0, steps=range(0, 41, 2)),
        }
        for gap in gaps
    ]


def test_differences_at_equal_flops():
    rows = {(row.branch, row.share): row for row in at_budgets(compare_seeds(seeds(0.05, 0.07)), 'copy')}
    early, late = rows['drop', 0.1], rows['drop', 1.0]
    # Averaged over the last twentieth of the budget before it.
    assert early.values == pytest.approx((0.05 - 0.002 * 7.5, 0.07 - 0.002 * 7.5))
    assert late.mean == pytest.approx(0.06 - 0.002 * 97.5)
    assert late.half_width == pytest.approx(12.706 * 0.01, rel=1e-3)
    assert ('short', 0.25) in rows and ('short', 0.5) not in rows
    assert not any(branch == 'copy' for branch, _ in rows)


def test_a_branch_whose_last_step_ends_a_little_earlier_has_spent_the_budget():
    runs = {'copy': run('copy', lambda x: 2 - 0.01 * x), 'less': run('less', lambda x: 2.0, step_flops=0.995)}
    rows = {row.share: row for row in at_budgets(compare_seeds([runs]), 'copy')}
    assert rows[1.0].mean == pytest.approx(0.01 * 97.5 * 0.995)


def test_the_table_is_in_order_of_the_end():
    lines = as_markdown(at_budgets(compare_seeds(seeds(0.05, 0.07)), 'copy'), 'copy').splitlines()
    assert lines[2] == '| branch | 10% | 25% | 50% | 100% |'
    assert lines[4].startswith('| drop | +0.0450 ± 0.1271 |') and lines[5].endswith('| - | - |')


def test_the_plot_has_a_panel_a_budget_two_in_a_row():
    plot = as_plot(at_budgets(compare_seeds(seeds(0.05, 0.07)), 'copy'), 'copy')
    width, height = Image.open(io.BytesIO(plot.png())).size
    assert plot.key == 'budgets' and len(plot.panels) == 4
    assert (width, height) == pytest.approx((2 * 4.9 * DPI, 2 * plot.height * DPI), abs=1)
    # An interval for each branch that got so far: `short` got to 25%.
    figure = matplotlib.figure.Figure()
    for panel, branches in zip(plot.panels, (2, 2, 1, 1), strict=True):
        ax = figure.add_subplot()
        panel(ax)
        assert [text.get_text() for text in ax.get_yticklabels()] == ['drop', 'short']
        assert len(ax.containers) == branches


def test_names_stay_beside_the_axis_however_many_they_are():
    ax = matplotlib.figure.Figure().add_subplot()
    for number in (3, 30):
        ax.clear()
        name_lines(ax, [(0.99, f'line {i}', 'black') for i in range(number)])
        at = sorted(text.xyann[1] for text in ax.texts)
        assert len(at) == number and at[0] > -0.01 and at[-1] < 1.06


def test_a_single_seed_has_no_interval():
    lines = as_markdown(at_budgets(compare_seeds(seeds(0.05)), 'copy'), 'copy').splitlines()
    assert '±' not in lines[4]


def test_legs_add_up():
    first = run('half', lambda x: 2 - 0.01 * x, steps=range(0, 51, 10))
    second = run('grow', lambda x: 1.5 - 0.01 * x, steps=range(0, 51, 10), step_flops=3.0, start_step=1050, sunk=550.0)
    both = chain([first, second])
    x, y = both.curve('loss', Axis.FLOPS)
    assert x[-1] == 50 + 150 and y[-1] == 0.0
    assert both.start[Axis.FLOPS] == 500 and both.start[Axis.STEPS] == 1000
    assert both.curve('loss', Axis.STEPS)[0][-1] == 100
    assert both.name == 'half'
