"""What MoE layers do: tokens left behind, routers, loads, and how far experts have come apart."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import PercentFormatter

from upcycle.log_lines import is_number
from upcycle.report.compare import Report
from upcycle.report.plots.axes import leave_empty, name_lines, set_ticks, set_title
from upcycle.report.plots.figure import INK, WORDS, Plot, of_the_first
from upcycle.report.plots.steps import OverSteps, denser
from upcycle.report.runs import Run, stack_of

# Of the layers of a stack; a model has seldom more than two.
SHADES = ('Oranges', 'Blues', 'Greens', 'Purples')


def expert_plots(reports: Sequence[Report]) -> Iterator[Plot]:
    """None where no run has MoE layers."""
    moe = [run for run in reports[0].runs if run.routed_layers]
    if not moe:
        return
    first = of_the_first(reports)
    yield Plot(
        'tokens_left_behind',
        'Tokens that no expert took',
        f'Share of the real tokens that pass a layer on the residual alone, per MoE layer.{first}',
        tuple(OverLayers(run, 'fraction_tokens_left_behind', 'tokens no expert took') for run in moe),
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
        tuple(Load(run) for run in moe),
    )
    yield Plot(
        'expert_load_over_steps',
        'Load of each expert over time',
        'Routed tokens per expert, as a multiple of an even share, in the layer of each model whose experts differ most. '
        f'An expert that stays blue is starved.{first}',
        tuple(LoadOverSteps(run) for run in moe),
    )


def diversity_plot(reports: Sequence[Report]) -> Iterator[Plot]:
    """Of runs with DIVERSITY_PERIOD."""
    logged = {key for run in reports[0].runs for record in run.split('diversity') for key in record}
    # Routers that give every token to every expert have no information to log, and earlier versions logged none.
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


def _means(reports: Sequence[Report], names: Sequence[str], split: str | None = None) -> tuple[OverSteps, ...]:
    """Panels of means over MoE layers."""
    keys = [f'experts/{name}' for name in names]
    return tuple(OverSteps(reports, key, WORDS[key], split, dense=False) for key in keys)


@dataclasses.dataclass(frozen=True)
class OverLayers:
    """A panel: a share over the step, a line a layer, each stack in shades of one colour.

    Attributes:
      run: whose layers.
      metric: of a layer.
      ylabel: in words.
    """

    run: Run
    metric: str
    ylabel: str

    def __call__(self, ax: Axes) -> None:
        """Draws it."""
        curves = {layer: denser(self.run, f'experts/{layer}/{self.metric}') for layer in self.run.routed_layers}
        curves = {layer: c for layer, c in curves.items() if len(c[0])}
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
        ax.set(xlabel='step', ylabel=self.ylabel)
        set_title(ax, self.run.name)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        ax.set_xlim(right=max(x[-1] for x, _ in curves.values()))
        set_ticks(ax.xaxis)
        name_lines(ax, labels)


@dataclasses.dataclass(frozen=True)
class Load:
    """A panel: tokens of each expert (columns) of each layer (rows) at the last logged step."""

    run: Run

    def __call__(self, ax: Axes) -> None:
        """Draws it."""
        loads = {layer: list(at.values())[-1] for layer, at in _loads(self.run).items()}
        experts = max(map(len, loads.values()), default=0)
        if not experts:
            leave_empty(ax)
            return
        grid = np.full((len(loads), experts), np.nan)
        for row, load in zip(grid, loads.values(), strict=True):
            row[: len(load)] = load
        _heat_map(ax, np.arange(experts + 1), grid, self.run.name)
        ax.set(xlabel='expert', yticks=np.arange(len(loads)) + 0.5)
        ax.set_yticklabels([_short(layer) for layer in loads])
        step = -(-experts // 8)
        ax.set_xticks(np.arange(0, experts, step) + 0.5, range(0, experts, step))


@dataclasses.dataclass(frozen=True)
class LoadOverSteps:
    """A panel: tokens of each expert (rows) over the step, in the layer whose experts differ most."""

    run: Run

    def __call__(self, ax: Axes) -> None:
        """Draws it."""
        loads = _loads(self.run)
        # Under Expert Choice the loads of a layer do not move.
        layer = max(loads, key=lambda layer: np.mean([np.std(load) for load in loads[layer].values()]), default=None)
        if layer is None:
            leave_empty(ax)
            return
        experts = len(list(loads[layer].values())[-1])
        # A run in several legs may have begun with fewer experts.
        at = {step: load for step, load in loads[layer].items() if len(load) == experts}
        steps, grid = np.array(list(at)), np.array(list(at.values())).T
        edges = np.concatenate([steps[:1] - 0.5, (steps[1:] + steps[:-1]) / 2, steps[-1:] + 0.5])
        _heat_map(ax, edges, grid, f'{self.run.name}: {_short(layer)}')
        ax.set(xlabel='step', ylabel='expert')
        step = -(-len(grid) // 8)
        ax.set_yticks(np.arange(0, len(grid), step) + 0.5, range(0, len(grid), step))
        set_ticks(ax.xaxis)


def _loads(run: Run) -> dict[str, dict[float, np.ndarray]]:
    """Of each layer, by step: experts' tokens as multiples of an even share, of the split that has more of them."""
    loads: dict[str, dict[float, np.ndarray]] = {}
    for record in max(run.split('train'), run.split('validation'), key=len):
        for layer in run.routed_layers:
            load = record.get(f'experts/{layer}/load')
            if isinstance(load, list) and load and all(map(is_number, load)):
                loads.setdefault(layer, {})[record['step']] = np.array(load, float) * len(load)
    return {layer: dict(sorted(at.items())) for layer, at in loads.items()}


def _heat_map(ax: Axes, edges: np.ndarray, grid: np.ndarray, title: str) -> None:
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, float(np.nanmax(grid))))
    # As vectors the cells of a page would weigh more than everything else on it.
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
    """`STACK/layers_1` -> `STACK 1`; of a path whose numbered part has another name, such as `A/B_7/C`, `block 7`."""
    for part in layer.split('/'):
        word, _, number = part.rpartition('_')
        if number.isdigit():
            return f'{stack_of(layer) if word.startswith("layer") else "block"} {number}'
    return layer
