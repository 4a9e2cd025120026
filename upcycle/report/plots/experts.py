"""Plots of MoE layers: tokens left behind, routers, expert loads, and diversity of experts."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import PercentFormatter

from upcycle.log_lines import is_number
from upcycle.report.compare import Report
from upcycle.report.plots.axes import leave_empty, name_lines, set_ticks, set_title
from upcycle.report.plots.figure import INK, WORDS, Panel, Plot, of_the_first
from upcycle.report.plots.steps import denser, over_steps
from upcycle.report.runs import Run, stack_of

# Colour maps for the layers of a stack; few models have more than two stacks.
SHADES = ('Oranges', 'Blues', 'Greens', 'Purples')


def expert_plots(reports: Sequence[Report]) -> Iterator[Plot]:
    """Yields the plots of MoE layers; nothing if no run has any."""
    moe = [run for run in reports[0].runs if run.routed_layers]
    if not moe:
        return
    first = of_the_first(reports)
    yield Plot(
        'tokens_left_behind',
        'Tokens that no expert took',
        f'Share of the real tokens that pass a layer on the residual alone, per MoE layer.{first}',
        tuple(functools.partial(_left_behind, run) for run in moe),
    )
    yield Plot(
        'router',
        'How decided the routers are',
        'Means over MoE layers. Entropy of the router distribution per token (with E experts at most ln E); '
        'confidence: the mean combine weight of a token that an expert took; spread of the load: standard '
        'deviation of the tokens of an expert over their mean (0 under Expert Choice).',
        _means(reports, ('router_entropy', 'router_confidence', 'load_cv')),
    )
    yield from diversity_plot(reports)
    yield Plot(
        'expert_load',
        'Load of each expert at the end',
        'Routed tokens per expert, as a multiple of an even share, at the last logged step. Expert Choice '
        f'fills every expert alike by construction, so its rows are even.{first}',
        tuple(functools.partial(_final_load, run) for run in moe),
    )
    yield Plot(
        'expert_load_over_steps',
        'Load of each expert over time',
        'Routed tokens per expert, as a multiple of an even share, in the layer of each model whose experts differ most. '
        f'An expert that stays blue is starved.{first}',
        tuple(functools.partial(load_over_steps, run) for run in moe),
    )


def diversity_plot(reports: Sequence[Report]) -> Iterator[Plot]:
    """Yields the plot of runs with DIVERSITY_PERIOD, if there are any."""
    logged = {key for run in reports[0].runs for record in run.split('diversity') for key in record}
    # `token_information` is not logged by routers that give every token to every expert, nor by earlier versions.
    keys = [key for key in ('expert_cosine', 'router_cosine', 'token_information') if f'experts/{key}' in logged]
    if keys:
        yield Plot(
            'diversity',
            'How far experts have come apart',
            'Means over pairs of experts, and over MoE layers. All parameters of an expert are one vector; copies start at 1. '
            'Information: how much the expert that took a token says of it (its id, or the label of its example), '
            'on the first evaluation batch; 0 where experts read alike, at most ln E.',
            _means(reports, keys, 'diversity'),
        )


def _means(reports: Sequence[Report], names: Sequence[str], split: str | None = None) -> tuple[Panel, ...]:
    """Returns one panel per metric, a mean over MoE layers."""
    keys = [f'experts/{name}' for name in names]
    return tuple(over_steps(reports, key, WORDS[key], split, dense=False) for key in keys)


def _left_behind(run: Run, ax: Axes) -> None:
    """Draws the share of tokens left behind over steps: one line per layer, each stack in shades of one colour."""
    curves = {layer: denser(run, f'experts/{layer}/fraction_tokens_left_behind') for layer in run.routed_layers}
    curves = {layer: curve for layer, curve in curves.items() if len(curve[0])}
    if not curves:
        leave_empty(ax)
        return
    labels = []
    for number, stack in enumerate(dict.fromkeys(map(stack_of, curves))):
        layers = [layer for layer in curves if stack_of(layer) == stack]
        shades = colormaps[SHADES[number % len(SHADES)]](np.linspace(0.45, 0.95, len(layers)))
        for i, (layer, shade) in enumerate(zip(layers, shades, strict=True)):
            x, y = curves[layer]
            ax.plot(x, y, color=shade, linewidth=1.3)
            if len(curves) <= 13 or i in (0, len(layers) - 1):
                labels.append((y[-1], _short(layer), tuple(shade)))
    ax.set(xlabel='step', ylabel='tokens no expert took')
    set_title(ax, run.name)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ax.set_xlim(right=max(x[-1] for x, _ in curves.values()))
    set_ticks(ax.xaxis)
    name_lines(ax, labels)


def _final_load(run: Run, ax: Axes) -> None:
    """Draws the load of each expert (columns) of each layer (rows) at the last logged step."""
    loads = {layer: list(at.values())[-1] for layer, at in _loads(run).items()}
    experts = max(map(len, loads.values()), default=0)
    if not experts:
        leave_empty(ax)
        return
    grid = np.full((len(loads), experts), np.nan)
    for row, load in zip(grid, loads.values(), strict=True):
        row[: len(load)] = load
    _heat_map(ax, np.arange(experts + 1), grid, run.name)
    ax.set(xlabel='expert', yticks=np.arange(len(loads)) + 0.5)
    ax.set_yticklabels([_short(layer) for layer in loads])
    _expert_ticks(ax.xaxis, experts)


def load_over_steps(run: Run, ax: Axes) -> None:
    """Draws the load of each expert (rows) over steps, in the layer whose experts differ most."""
    loads = _loads(run)
    # Under Expert Choice the loads of a layer are constant.
    layer = max(loads, key=lambda layer: np.mean([np.std(load) for load in loads[layer].values()]), default=None)
    if layer is None:
        leave_empty(ax)
        return
    experts = len(list(loads[layer].values())[-1])
    # A chained run may have begun with fewer experts.
    at = {step: load for step, load in loads[layer].items() if len(load) == experts}
    steps, grid = np.array(list(at)), np.array(list(at.values())).T
    edges = np.concatenate([steps[:1] - 0.5, (steps[1:] + steps[:-1]) / 2, steps[-1:] + 0.5])
    _heat_map(ax, edges, grid, f'{run.name}: {_short(layer)}')
    ax.set(xlabel='step', ylabel='expert')
    _expert_ticks(ax.yaxis, experts)
    set_ticks(ax.xaxis)


def _expert_ticks(axis: Axis, experts: int) -> None:
    """Numbers at most eight of the experts, in the middle of their cells."""
    shown = range(0, experts, -(-experts // 8))
    axis.set_ticks([expert + 0.5 for expert in shown], shown)


def _loads(run: Run) -> dict[str, dict[float, np.ndarray]]:
    """Returns the load per expert as multiples of an even share, by layer and step, from the split that has more lines."""
    loads: dict[str, dict[float, np.ndarray]] = {}
    for record in max(run.split('train'), run.split('validation'), key=len):
        for layer in run.routed_layers:
            load = record.get(f'experts/{layer}/load')
            if isinstance(load, list) and load and all(map(is_number, load)):
                loads.setdefault(layer, {})[record['step']] = np.array(load, float) * len(load)
    return {layer: dict(sorted(at.items())) for layer, at in loads.items()}


def _heat_map(ax: Axes, edges: np.ndarray, grid: np.ndarray, title: str) -> None:
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, float(np.nanmax(grid))))
    # As vectors the cells would be larger than everything else on the page.
    cells = ax.pcolormesh(edges, np.arange(len(grid) + 1), grid, cmap='RdBu_r', norm=norm, rasterized=True)
    ax.invert_yaxis()
    set_title(ax, title)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(cells, ax=ax, fraction=0.05, pad=0.03)
    bar.ax.tick_params(labelsize=7, colors=INK, length=2)
    bar.set_label('load, 1 = an even share', size=8, color=INK)
    bar.outline.set_visible(False)


def _short(layer: str) -> str:
    """Shortens a path: `STACK/layers_1` -> `STACK 1`, and a path with another numbered part, `A/B_7/C`, -> `block 7`."""
    for part in layer.split('/'):
        word, _, number = part.rpartition('_')
        if number.isdigit():
            return f'{stack_of(layer) if word.startswith("layer") else "block"} {number}'
    return layer
