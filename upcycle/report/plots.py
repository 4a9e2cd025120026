"""The report's figures. Matplotlib is used without pyplot, so a caller's figures and settings are left alone."""

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis as MatplotlibAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, MaxNLocator, PercentFormatter

from upcycle.report.claims import curve_of
from upcycle.report.compare import Report, half_width
from upcycle.report.runs import Axis, Curve, Role, Run, is_number

Panel = Callable[[Axes], None]
Label = tuple[float, str, str]

# Okabe and Ito's palette: told apart by the colour-blind and in a grey print.
ROLE_COLOURS = {
    Role.DENSE: '#6b7280',
    Role.DENSE_CONTINUATION: '#0072b2',
    Role.UPCYCLED: '#d55e00',
    Role.SCRATCH: '#009e73',
}
EXTRA_COLOURS = ('#cc79a7', '#b8860b', '#56b4e9', '#7b5ea7', '#8b5a2b', '#4d4d4d')
WORDS = {
    'loss': 'validation loss (nats)',
    'accuracy': 'accuracy',
    'experts/router_entropy': 'router entropy (nats)',
    'experts/router_confidence': 'router confidence',
    'experts/load_cv': 'spread of the load',
    'experts/token_information': 'information on tokens (nats)',
    'experts/expert_cosine': 'cosine of two experts',
    'experts/router_cosine': 'cosine of two router columns',
}
# From more branches than this on their means alone are drawn: the lines of all seeds would hide them.
MANY = 8
INK, SOFT = '#374151', '#6b7280'


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure of one or more panels: shown apart on a web page, together in the PNG called `key`.

    Attributes:
      key: the file's name.
      title: above it.
      caption: below it.
      panels: what draws each.
      columns: panels in a row of the PNG, at most.
      height: of a panel, in inches.
    """

    key: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int = 4
    height: float = 3.35

    def svg(self) -> list[bytes]:
        """One SVG per panel, its text drawn as outlines so that it looks the same on every machine."""
        return [_save([panel], 1, self.height, 'svg') for panel in self.panels]

    def png(self) -> bytes:
        """All panels, row by row."""
        return _save(self.panels, self.columns, self.height, 'png')


def _save(panels: Sequence[Panel], columns: int, height: float, suffix: str) -> bytes:
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.9 * columns, height * rows), layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.06)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for ax in places[len(panels) :]:
        ax.remove()
    for ax, panel in zip(places[: len(panels)], panels, strict=True):
        ax.spines[['top', 'right']].set_visible(False)
        ax.spines[['left', 'bottom']].set_color('#9ca3af')
        ax.tick_params(which='both', colors=INK, labelsize=8, length=3)
        ax.grid(axis='y', color='#e5e7eb', linewidth=0.7)
        ax.set_axisbelow(True)
        panel(ax)
        # Names of runs are the user's; only the numbers of a logarithmic axis are mathematics.
        legend = ax.get_legend()
        for text in (ax.title, *ax.texts, *(legend.get_texts() if legend else ())):
            text.set_parse_math(False)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set(size=9, color=INK)
    file = io.BytesIO()
    figure.savefig(file, format=suffix, dpi=160, metadata={'Date': None} if suffix == 'svg' else None)
    return file.getvalue()


def unit(axis: Axis, largest: float) -> tuple[float, str]:
    """Size and name of the unit in which values up to `largest` read well."""
    units = {
        Axis.FLOPS: [(10.0**p, f'{s}FLOPs') for p, s in ((21, 'Z'), (18, 'E'), (15, 'P'), (12, 'T'), (9, 'G'))],
        Axis.SECONDS: [(86400.0, 'days'), (3600.0, 'hours'), (60.0, 'min')],
        Axis.STEPS: [],
    }[axis]
    return next((u for u in units if abs(largest) >= 2 * u[0]), (1.0, axis.word))


def colours(reports: Sequence[Report]) -> dict[str, str]:
    """A colour per branch, the same in every figure: the role's for the first branch of a role."""
    result, spare = {}, iter(EXTRA_COLOURS * 9)
    for run in (run for report in reports for run in report.runs):
        if run.name not in result:
            colour = ROLE_COLOURS.get(run.role)
            result[run.name] = next(spare) if colour is None or colour in result.values() else colour
    return result


def main_plots(reports: Sequence[Report], evaluated_on: str | None = None) -> list[Plot]:
    """Validation loss and accuracy against extra cost (the paper's figure 2): FLOPs, steps, seconds."""
    n = f' Evaluated on {evaluated_on}.' if evaluated_on else ''
    many = ''
    if len(reports) > 1:
        few = len(reports[0].branches) <= MANY
        many = f' Thin lines: {len(reports)} seeds; bold: their mean.' if few else f' Means over {len(reports)} seeds.'
    sunk = any(report.sunk[Axis.FLOPS] for report in reports)
    scratch = any(report.find(Role.SCRATCH) for report in reports) and sunk
    whole = (
        ' MoE from scratch is charged its whole budget: its total less what the dense checkpoint had cost, drawn '
        'from zero on (before that it spends what the others had already spent).'
    )
    seconds = ' Seconds are those of training steps alone: no compilation, evaluation or saving.'
    return [
        Plot(
            f'extra_{axis.word.lower()}',
            f'Against extra {axis.word}',
            f'Validation loss, the mean per token or image (lower is better), and accuracy over the same (higher is '
            f'better), against the {axis.word} spent '
            f'after the dense checkpoint; dashed: that checkpoint itself.{n}{many}{whole if scratch else ""}'
            f'{seconds if axis is Axis.SECONDS else ""}',
            tuple(_against(reports, metric, axis) for metric in ('loss', 'accuracy')),
        )
        for axis in Axis
    ]


def _against(reports: Sequence[Report], metric: str, axis: Axis, until: float = 1.0) -> Panel:
    """One metric of every branch against extra cost, up to a fraction `until` of the longest branch.

    A part of the whole is a close-up of the branches that started from the checkpoint, with their training batches.
    """

    def draw(ax: Axes) -> None:
        runs = [run for run in reports[0].branches if until == 1 or not run.from_zero]
        bundles = _bundles(reports, runs, lambda report, run: report.curve(run, metric, axis))
        largest = max((x[-1] for b in bundles for x, _ in b.curves), default=0)
        if largest <= 0:
            _empty(ax)
            return
        if until < 1:
            # At least the second evaluation after the start belongs in a close-up.
            largest = max(until * largest, *(x[min(2, len(x) - 1)] for b in bundles for x, _ in b.curves))
        size, name = unit(axis, largest)
        if until == 1:
            labels = _lines(ax, bundles, size, largest)
        else:
            labels = _dots(ax, bundles, size, largest, {'loss': 'cross_entropy_loss'}.get(metric, metric), axis)
        dense = [report.dense[metric] for report in reports if metric in report.dense]
        if dense:
            value = sum(dense) / len(dense)
            ax.axhline(value, color=ROLE_COLOURS[Role.DENSE], linestyle=(0, (4, 3)), linewidth=1)
            labels.append((value, 'dense checkpoint', ROLE_COLOURS[Role.DENSE]))
        _frame(ax, bundles, largest, dense, skip=0.08 if until == 1 else 0.0)
        ax.set_xlim(-0.015 * largest / size, largest / size)
        what = {Axis.FLOPS: f'extra compute ({name})', Axis.SECONDS: f'extra training time ({name})'}
        ax.set(ylabel=WORDS[metric] if until == 1 else WORDS[metric].removeprefix('validation '))
        ax.set_xlabel(what.get(axis, 'extra steps'))
        _ticks(ax.xaxis)
        if reports[0].sunk[axis]:
            share = size / reports[0].sunk[axis]
            top = ax.secondary_xaxis('top', functions=(lambda x: x * share, lambda x: x / share))
            _ticks(top.xaxis, PercentFormatter(1.0, decimals=None))
            top.set_xlabel("of the dense checkpoint's cost", size=7.5, color=SOFT)
            top.tick_params(colors=SOFT, labelsize=7, length=2)
            top.spines['top'].set_color('#d1d5db')
        _label(ax, labels)

    return draw


@dataclasses.dataclass(frozen=True)
class _Bundle:
    """The same branch of every seed: its label, colour and one curve per seed."""

    name: str
    colour: str
    runs: list[tuple[Report, Run]]
    curves: list[Curve]


def _bundles(reports: Sequence[Report], runs: Sequence[Run], curve: Callable[[Report, Run], Curve]) -> list[_Bundle]:
    palette, result = colours(reports), []
    for name in dict.fromkeys(run.name for run in runs):
        pairs = {(r.path, r.name): (report, r) for report in reports for r in report.runs if r.name == name}
        known = [(pair, c) for pair in pairs.values() if len((c := curve(*pair))[0])]
        if known:
            result.append(_Bundle(name, palette[name], *map(list, zip(*known, strict=True))))
    return result


def _lines(ax: Axes, bundles: Sequence[_Bundle], size: float, high: float) -> list[Label]:
    """Draws each bundle within [0, high], thin per seed and bold for their mean; returns the labels of the means."""
    labels = []
    for bundle in bundles:
        curves = [c for c in (_cut(curve, 0, high) for curve in bundle.curves) if len(c[0])]
        for x, y in curves if len(curves) > 1 and len(bundles) <= MANY else ():
            ax.plot(x / size, y, color=bundle.colour, linewidth=0.7, alpha=0.4)
        x, y = _mean(curves) if curves else ((), ())
        if len(x):
            ax.plot(x / size, y, color=bundle.colour, linewidth=1.8)
            real = np.isin(x, bundle.curves[0][0])
            if real.sum() <= 30:
                ax.plot(x[real] / size, y[real], 'o', color=bundle.colour, markersize=2.8)
            labels.append((y[-1], bundle.name, bundle.colour))
    return labels


def _dots(ax: Axes, bundles: Sequence[_Bundle], size: float, high: float, train: str, axis: Axis) -> list[Label]:
    """Draws evaluations as dots and training batches as thin lines: a line between few dots would invent a slope."""
    labels = []
    for bundle in bundles:
        ends = []
        for (report, run), curve in zip(bundle.runs, bundle.curves, strict=True):
            batches = report.curve(run, train, axis, 'train')
            for (x, y), style in ((batches, {'linewidth': 0.8}), (curve, {'marker': 'o', 'ms': 4, 'ls': ''})):
                keep = (x >= 0) & (x <= high)
                ax.plot(x[keep] / size, y[keep], color=bundle.colour, **style)
            ends.append(np.interp(high, *curve))
        labels.append((float(np.mean(ends)), bundle.name, bundle.colour))
    return labels


def _cut(curve: Curve, low: float, high: float) -> Curve:
    """The part of a curve within [low, high], with interpolated points where it crosses the bounds."""
    x, y = curve
    edges = [e for e in (low, high) if len(x) and x[0] < e < x[-1]]
    xs = np.unique(np.concatenate([x[(x >= low) & (x <= high)], edges]))
    return xs, np.interp(xs, x, y) if len(x) else xs


def _mean(curves: Sequence[Curve]) -> Curve:
    """The mean curve where all of them are known, on the first one's points."""
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    # Seeds differ in their seconds, so the bounds are seldom points of the first curve.
    x = _cut(curves[0], low, high)[0]
    return x, np.mean([np.interp(x, *curve) for curve in curves], axis=0)


def _frame(ax: Axes, bundles: Sequence[_Bundle], largest: float, levels: Sequence[float], skip: float) -> None:
    """Limits of y that leave a brief, tall initial drop off the axis, and a note that says how far it goes."""
    parts = [(b, _cut(c, 0, largest)) for b in bundles for c in b.curves]
    every = np.concatenate([y for _, (_, y) in parts] + [np.array(levels)])
    late = np.concatenate([y[x >= skip * largest] for _, (x, y) in parts] + [np.array(levels)])
    shown = every if not len(late) or np.ptp(every) <= 2.5 * np.ptp(late) else late
    span = float(np.ptp(shown) or abs(shown[0]) or 1.0)
    low, high = float(shown.min() - 0.07 * span), float(shown.max() + 0.07 * span)
    ax.set_ylim(low, high)
    firsts = {b.name: (b.colour, y[0]) for b, (_, y) in parts if len(y)}
    far = {name: first for name, first in firsts.items() if not low - 0.3 * span < first[1] < high + 0.3 * span}
    for i, (name, (colour, value)) in enumerate(far.items()):
        up = value > high
        ax.annotate(
            f'{name} starts at {value:.3g} {"↑" if up else "↓"}',
            (0.985, 0.98 - 0.075 * i if up else 0.03 + 0.075 * i),
            xycoords='axes fraction',
            ha='right',
            va='top' if up else 'bottom',
            size=7.5,
            color=colour,
            bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1},
        )


def _label(ax: Axes, labels: Sequence[Label], gap: float = 0.068) -> None:
    """Names lines at the right edge, at their last values, pushed apart so that no two names overlap."""
    # More names than the axis is high for are set smaller, within 1.05 of it.
    size = 8 if len(labels) * gap <= 1.05 else 6.5
    gap = min(gap, 1.05 / max(len(labels), 1))
    place = ax.transData + ax.transAxes.inverted()
    middle = ax.get_xlim()[1]
    order = sorted((min(max(place.transform((middle, y))[1], 0.0), 1.0), text, colour) for y, text, colour in labels)
    at = [y for y, _, _ in order]
    for _ in range(200):
        for i in range(1, len(at)):
            push = (gap - (at[i] - at[i - 1])) / 2
            if push > 0:
                at[i], at[i - 1] = at[i] + push, at[i - 1] - push
    # Many names at one end push each other past it.
    lift = max(0.01 - at[0], min(0.0, 1.05 - at[-1])) if at else 0.0
    line = {'arrowstyle': '-', 'linewidth': 0.5, 'shrinkA': 0, 'shrinkB': 0, 'relpos': (0, 0.5)}
    for y, (true, text, colour) in zip((y + lift for y in at), order, strict=True):
        ax.annotate(
            text,
            (1.005, true),
            (1.035, y),
            xycoords='axes fraction',
            va='center',
            size=size,
            color=colour,
            annotation_clip=False,
            arrowprops={**line, 'color': colour} if abs(y - true) > 0.02 else None,
        )


def _ticks(axis: MatplotlibAxis, formatter: Formatter | None = None) -> None:
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(formatter or FuncFormatter(lambda x, _: f'{x:,.10g}'))


def _empty(ax: Axes) -> None:
    ax.text(0.5, 0.5, 'nothing logged yet', transform=ax.transAxes, ha='center', color=SOFT, size=9)
    ax.set(xticks=[], yticks=[])


def from_zero_plot(reports: Sequence[Report]) -> Iterator[Plot]:
    """MoE from scratch as the paper's figure 4 draws it: it and the branches each count their own cost."""
    scratch, sunk = reports[0].find(Role.SCRATCH), reports[0].sunk[Axis.FLOPS]
    if not scratch or not sunk or not reports[0].find(Role.UPCYCLED):
        return

    def panel(metric: str) -> Panel:
        def draw(ax: Axes) -> None:
            runs = [r for r in reports[0].branches if r.role in (Role.SCRATCH, Role.UPCYCLED)]
            bundles = _bundles(reports, runs, lambda _, run: run.curve(metric, Axis.FLOPS))
            largest = max((x[-1] for b in bundles for x, _ in b.curves), default=0)
            if largest <= 0:
                _empty(ax)
                return
            labels = _lines(ax, bundles, sunk, largest)
            _frame(ax, bundles, largest, [], skip=0.15)
            ax.set(ylabel=WORDS[metric], xlabel="own FLOPs, of the dense checkpoint's")
            ax.set_xlim(0, largest / sunk)
            _ticks(ax.xaxis, PercentFormatter(1.0, decimals=None))
            _label(ax, labels)

        return draw

    yield Plot(
        'from_scratch',
        'When does a MoE from scratch catch up?',
        "Each curve counts only its own FLOPs: the upcycled one none of the dense checkpoint's, as if that came free "
        "(the convention of the paper's figure 4). The upcycled curve ends where its run ends.",
        (panel('loss'), panel('accuracy')),
    )


def drop_plot(reports: Sequence[Report]) -> Iterator[Plot]:
    """The first tenth after the dense checkpoint, where upcycled models first lose and then recover."""
    if reports[0].find(Role.UPCYCLED):
        yield Plot(
            'initial_drop',
            'Right after upcycling',
            'The first tenth of the extra steps. Dots: validation; thin lines: single training batches, where logged. '
            'The value at zero is measured before any training.',
            tuple(_against(reports, m, Axis.STEPS, until=0.1) for m in ('loss', 'accuracy')),
        )


def _own_step(run: Run, key: str, split: str) -> Curve:
    points = np.array([(r['step'], r[key]) for r in run.split(split) if is_number(r.get(key))], float).reshape(-1, 2)
    # A paper's figure is some hundreds of pixels wide: more points only make a heavier file.
    points = points[:: -max(1, len(points) // 400)][::-1]
    return points[:, 0], points[:, 1]


def _denser(run: Run, key: str) -> Curve:
    return max((_own_step(run, key, split) for split in ('validation', 'train')), key=lambda c: len(c[0]))


def _over_steps(
    reports: Sequence[Report],
    key: str,
    ylabel: str,
    split: str | None = None,
    log: bool = False,
    dense: bool = True,
    median: bool = False,
) -> Panel:
    """A logged value over the absolute step, the dense run's included; `median` draws a running one over the noise."""

    def draw(ax: Axes) -> None:
        runs = [r for r in reports[0].runs if dense or r.role is not Role.DENSE]
        bundles = _bundles(reports, runs, lambda _, run: _own_step(run, key, split) if split else _denser(run, key))
        if not bundles:
            _empty(ax)
            return
        labels = []
        for i, bundle in enumerate(bundles):
            # Branches may lie on each other exactly (one schedule): wide under narrow shows both.
            width = 1.3 if median else 1.2 + min(0.9, 3.6 / len(bundles)) * (len(bundles) - 1 - i)
            for x, y in bundle.curves:
                if median:
                    ax.plot(x, y, color=bundle.colour, linewidth=0.5, alpha=0.25)
                    y = _running_median(y)
                ax.plot(x, y, color=bundle.colour, linewidth=width, alpha=1 if len(bundle.curves) == 1 else 0.6)
            labels.append((float(y[-1]), bundle.name, bundle.colour))
        start = reports[0].sunk[Axis.STEPS]
        if log:
            ax.set_yscale('log')
            low, high = ax.get_ylim()
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
            # Within a decade the powers of ten alone would leave an axis without a number.
            ax.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f'{v:g}' if high < 10 * low else ''))
        if start and dense:
            ax.axvline(start, color='#9ca3af', linewidth=0.8, linestyle=(0, (1, 2)))
            where = {'xycoords': ('data', 'axes fraction'), 'ha': 'center', 'va': 'bottom'}
            ax.annotate('dense checkpoint', (start, 1.01), size=7, color=SOFT, **where)
        ax.set(xlabel='step', ylabel=ylabel)
        ax.set_xlim(right=max(x[-1] for b in bundles for x, _ in b.curves))
        _ticks(ax.xaxis)
        if key == 'experts/router_entropy':
            experts = {len(v) for run in runs for r in run.records[-3:] for k, v in r.items() if k.endswith('/load')}
            for number in experts:
                ax.axhline(np.log(number), color=SOFT, linestyle=(0, (1, 2)), linewidth=0.9)
                labels.append((np.log(number), f'uniform, ln {number}', SOFT))
        _label(ax, labels)

    return draw


def _running_median(y: np.ndarray) -> np.ndarray:
    half = max(1, len(y) // 40)
    return np.array([np.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))])


def _moe_runs(report: Report) -> list[Run]:
    return [run for run in report.runs if run.routed_layers]


def _short(layer: str) -> str:
    """`encoder/layers_1` -> `encoder 1`; `Transformer/encoderblock_7/MlpBlock_0` -> `block 7`."""
    for part in layer.split('/'):
        word, _, number = part.rpartition('_')
        if number.isdigit():
            return f'{layer.split("/")[0] if word.startswith("layer") else "block"} {number}'
    return layer


def _layers_panel(run: Run, metric: str, ylabel: str) -> Panel:
    def draw(ax: Axes) -> None:
        curves = {layer: _denser(run, f'experts/{layer}/{metric}') for layer in run.routed_layers}
        curves = {layer: c for layer, c in curves.items() if len(c[0])}
        if not curves:
            _empty(ax)
            return
        labels = []
        for stack in dict.fromkeys('decoder' in layer for layer in curves):
            layers = [layer for layer in curves if ('decoder' in layer) == stack]
            shades = colormaps['Blues' if stack else 'Oranges'](np.linspace(0.45, 0.95, len(layers)))
            for i, (layer, shade) in enumerate(zip(layers, shades, strict=True)):
                x, y = curves[layer]
                ax.plot(x, y, color=shade, linewidth=1.3)
                if len(curves) <= 13 or i in (0, len(layers) - 1):
                    labels.append((y[-1], _short(layer), shade))
        ax.set(xlabel='step', ylabel=ylabel, title=run.name)
        ax.title.set(size=9, color=INK)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        ax.set_xlim(right=max(x[-1] for x, _ in curves.values()))
        _ticks(ax.xaxis)
        _label(ax, [(y, text, tuple(c)) for y, text, c in labels])

    return draw


def _loads(run: Run) -> dict[str, dict[float, np.ndarray]]:
    """Of each layer, by step: experts' tokens as multiples of an even share, of the split that has more of them."""
    loads: dict[str, dict[float, np.ndarray]] = {}
    for record in max(run.split('train'), run.split('validation'), key=len):
        for layer in run.routed_layers:
            load = record.get(f'experts/{layer}/load')
            if isinstance(load, list) and load and all(map(is_number, load)):
                loads.setdefault(layer, {})[record['step']] = np.array(load, float) * len(load)
    return {layer: dict(sorted(at.items())) for layer, at in loads.items()}


def _load_panel(run: Run) -> Panel:
    def draw(ax: Axes) -> None:
        loads = {layer: list(at.values())[-1] for layer, at in _loads(run).items()}
        experts = max(map(len, loads.values()), default=0)
        if not experts:
            _empty(ax)
            return
        grid = np.full((len(loads), experts), np.nan)
        for row, load in zip(grid, loads.values(), strict=True):
            row[: len(load)] = load
        _heat_map(ax, np.arange(experts + 1), grid, run.name)
        ax.set(xlabel='expert', yticks=np.arange(len(loads)) + 0.5)
        ax.set_yticklabels([_short(layer) for layer in loads])
        step = -(-experts // 8)
        ax.set_xticks(np.arange(0, experts, step) + 0.5, range(0, experts, step))

    return draw


def _load_over_steps_panel(run: Run) -> Panel:
    def draw(ax: Axes) -> None:
        loads = _loads(run)
        # Under Expert Choice the loads of a layer do not move.
        layer = max(loads, key=lambda layer: np.mean([np.std(load) for load in loads[layer].values()]), default=None)
        if layer is None:
            _empty(ax)
            return
        experts = len(list(loads[layer].values())[-1])
        # A run in several legs may have begun with fewer experts.
        at = {step: load for step, load in loads[layer].items() if len(load) == experts}
        steps, grid = np.array(list(at)), np.array(list(at.values())).T
        edges = np.concatenate([steps[:1] - 0.5, (steps[1:] + steps[:-1]) / 2, steps[-1:] + 0.5])
        _heat_map(ax, edges, grid, f'{run.name}: {_short(layer)}')
        ax.set(xlabel='step', ylabel='expert')
        step = -(-len(grid) // 8)
        ax.set_yticks(np.arange(0, len(grid), step) + 0.5, range(0, len(grid), step))
        _ticks(ax.xaxis)

    return draw


def _heat_map(ax: Axes, edges: np.ndarray, grid: np.ndarray, title: str) -> None:
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, float(np.nanmax(grid))))
    # As vectors the cells of a page would weigh more than everything else on it.
    image = ax.pcolormesh(edges, np.arange(len(grid) + 1), grid, cmap='RdBu_r', norm=norm, rasterized=True)
    ax.invert_yaxis()
    ax.set_title(title, size=9, color=INK)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03)
    bar.ax.tick_params(labelsize=7, colors=INK, length=2)
    bar.set_label('load, 1 = an even share', size=8, color=INK)
    bar.outline.set_visible(False)


def step_zero_plot(reports: Sequence[Report]) -> list[Plot]:
    """The paper's figure 15, of the first upcycled run whose receipt holds it."""
    runs = [r for r in reports[0].branches if r.role is Role.UPCYCLED and (r.receipt or {}).get('step_0')]
    if not runs:
        return []
    run, base = runs[0], reports[0].find(Role.DENSE_CONTINUATION)
    first = ' Of several seeds, the first.' if len(reports) > 1 else ''
    panels = (('loss', WORDS['loss']), ('accuracy', 'accuracy'), ('fraction_tokens_left_behind', 'tokens left behind'))
    return [
        Plot(
            'step_0',
            'Before any training',
            'The upcycled model as surgery made it, at other capacity factors: with combine weights normalised, a token that '
            'some expert took starts with the dense output; raw, with a part of it. On the first batches of the evaluation '
            f'split; dashed: the dense model on all of it.{first}',
            tuple(_step_zero_panel(run, base, metric, words) for metric, words in panels),
        )
    ]


def _step_zero_panel(run: Run, base: Run | None, metric: str, words: str) -> Panel:
    def draw(ax: Axes) -> None:
        rows = run.receipt['step_0']
        for normalized, colour, name in ((True, '#d55e00', 'normalised'), (False, '#b8860b', 'raw')):
            points = sorted((row['capacity_factor'], row[metric]) for row in rows if row['normalized'] is normalized)
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker='o', markersize=3, linewidth=1.4, label=name)
        dense = base.split('validation')[0].get(metric) if base and base.split('validation') else None
        if is_number(dense):
            ax.axhline(dense, color=SOFT, linestyle='--', linewidth=1, label='dense')
        factors = sorted({row['capacity_factor'] for row in rows})
        ax.set_xscale('log', base=2)
        ax.set_xticks(factors, [f'{factor:g}' for factor in factors])
        ax.set(xlabel='capacity factor', ylabel=words)
        ax.legend(fontsize=7.5, frameon=False, labelcolor=INK)

    return draw


@dataclasses.dataclass(frozen=True)
class Final:
    """What a plot of ends needs: where runs end (or begin) against what distinguishes them.

    Attributes:
      xlabel: what that is.
      series: name: (value, branch) pairs.
      log: the axis counts doublings.
      metrics: of validation, or 'SPLIT/NAME'; a panel each.
      at_start: the first evaluation instead of the last.
    """

    xlabel: str
    series: Mapping[str, Sequence[tuple[float, str]]]
    log: bool = False
    metrics: Sequence[str] = ('loss', 'accuracy')
    at_start: bool = False


def final_plot(final: Final, seeds: Sequence[Mapping[str, Run]], key: str) -> Plot:
    """Means over seeds with 95% intervals, and a dot for every seed.

    Args:
      final: what to draw.
      seeds: of each, runs by branch.
      key: the name of its file.
    """
    when = 'before training' if final.at_start else 'at the end of each run'
    bars = ' Dots: seeds; bars: the 95% interval of their mean.' if len(seeds) > 1 else ''
    return Plot(
        key,
        f'Against {final.xlabel}',
        f'Validation values {when}; all runs of a seed had the same extra FLOPs, where nothing else is said.{bars}',
        tuple(_final_panel(final, seeds, metric) for metric in final.metrics),
    )


def _final_panel(final: Final, seeds: Sequence[Mapping[str, Run]], metric: str) -> Panel:
    def value(run: Run) -> float | None:
        _, y = curve_of(run, metric, Axis.STEPS)
        return float(y[0 if final.at_start else -1]) if len(y) else None

    def draw(ax: Axes) -> None:
        every = sorted({x for points in final.series.values() for x, _ in points})
        palette = [ROLE_COLOURS[Role.UPCYCLED], ROLE_COLOURS[Role.DENSE_CONTINUATION], *EXTRA_COLOURS]
        for colour, (name, points) in zip(palette, final.series.items(), strict=False):
            found = []
            for x, branch in points:
                values = [v for runs in seeds if branch in runs and (v := value(runs[branch])) is not None]
                if values:
                    found.append((x, float(np.mean(values)), half_width(values) or 0.0))
                    ax.plot([x] * len(values), values, 'o', color=colour, markersize=2.5, alpha=0.45)
            if found:
                x, y, width = zip(*found, strict=True)
                ax.errorbar(x, y, width, color=colour, linewidth=1.5, capsize=2, elinewidth=0.9, label=name)
        if not ax.lines:
            _empty(ax)
            return
        if final.log:
            ax.set_xscale('log', base=2)
        ax.set_xticks(every, [f'{x:g}' for x in every])
        ax.minorticks_off()
        ax.set(xlabel=final.xlabel, ylabel=WORDS.get(metric, metric.replace('/', ', ').replace('_', '-')))
        ax.legend(fontsize=7.5, frameon=False, labelcolor=INK)

    return draw


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
            'Information: how much it says of a token (its id; of a patch, the label of its image) which expert took it, '
            'on the first evaluation batch; 0 where experts read alike, at most ln E.',
            tuple(
                _over_steps(reports, f'experts/{key}', WORDS[f'experts/{key}'], 'diversity', dense=False)
                for key in keys
            ),
        )


def other_plots(reports: Sequence[Report]) -> list[Plot]:
    """Everything after the main figure: the initial drop, scratch from zero, routing, schedule, throughput."""
    plots = [*step_zero_plot(reports), *drop_plot(reports), *from_zero_plot(reports)]
    moe = _moe_runs(reports[0])
    first = ' Of several seeds, the first.' if len(reports) > 1 else ''
    if moe:
        left = 'fraction_tokens_left_behind'
        plots += [
            Plot(
                'tokens_left_behind',
                'Tokens that no expert took',
                f'Share of the real tokens that pass a layer on the residual alone, per MoE layer.{first}',
                tuple(_layers_panel(run, left, 'tokens no expert took') for run in moe),
            ),
            Plot(
                'router',
                'How decided the routers are',
                'Means over MoE layers. Entropy of the router distribution per token (with E experts at most ln E); '
                'confidence: the mean combine weight of a token that an expert took; spread of the load: standard '
                'deviation of the tokens of an expert over their mean (0 under Expert Choice).',
                tuple(
                    _over_steps(reports, f'experts/{key}', WORDS[f'experts/{key}'], dense=False)
                    for key in ('router_entropy', 'router_confidence', 'load_cv')
                ),
            ),
            *diversity_plot(reports),
            Plot(
                'expert_load',
                'Load of each expert at the end',
                'Routed tokens per expert, as a multiple of an even share, at the last logged step. Expert Choice '
                f'fills every expert alike by construction, so its rows are even.{first}',
                tuple(_load_panel(run) for run in moe),
            ),
            Plot(
                'expert_load_over_steps',
                'Load of each expert over time',
                'Routed tokens per expert, as a multiple of an even share, in the layer of each model whose experts differ most. '
                f'An expert that stays blue is starved.{first}',
                tuple(_load_over_steps_panel(run) for run in moe),
            ),
        ]
    plots.append(
        Plot(
            'schedule',
            'Learning rate and gradient norm',
            'Over the steps of the dense run and of its branches. Identical schedules lie on each other. '
            'Gradient norm: faint as logged, bold the running median.',
            (
                _over_steps(reports, 'learning_rate', 'learning rate', 'train'),
                _over_steps(reports, 'gradient_norm', 'gradient norm', 'train', log=True, median=True),
            ),
        )
    )
    plots.append(
        Plot(
            'throughput',
            'Throughput',
            'Training steps per second on the machine that ran them, without compilation, evaluation and saving: '
            'faint as logged, bold the running median.',
            (_over_steps(reports, 'steps_per_second', 'steps per second', 'train', median=True),),
        )
    )
    return plots
