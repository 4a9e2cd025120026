"""Figures of one or more panels, and their colours and words.

Matplotlib is used without pyplot, so a caller's figures and settings are left alone.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Sequence

import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from upcycle.report.compare import Report
from upcycle.report.runs import Role

Panel = Callable[[Axes], None]

# Okabe and Ito's palette: distinct for the colour-blind and in greyscale.
ROLE_COLOURS = {
    Role.DENSE: '#6b7280',
    Role.DENSE_CONTINUATION: '#0072b2',
    Role.UPCYCLED: '#d55e00',
    Role.SCRATCH: '#009e73',
}
EXTRA_COLOURS = ('#cc79a7', '#b8860b', '#56b4e9', '#7b5ea7', '#8b5a2b', '#4d4d4d')
# Of a picture: panels in a row, dots per inch, size of the palette.
COLUMNS = 2
DPI = 90
COLOURS = 32
INK, SOFT, RULE = '#374151', '#6b7280', '#e5e7eb'
# Labels of axes, by metric.
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


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure of one or more panels, two in a row.

    Attributes:
      key: file name, without the suffix.
      title: text above the figure.
      caption: text below the figure.
      panels: functions that draw one panel each.
      height: height of a panel, in inches.
    """

    key: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    height: float = 3.35

    def png(self) -> bytes:
        """Renders a PNG with a small palette: a fifth of the bytes of full colour."""
        full, file = io.BytesIO(), io.BytesIO()
        _figure(self.panels, self.height).savefig(full, format='png', dpi=DPI)
        picture = PIL.Image.open(full).convert('RGB')
        method, dither = PIL.Image.Quantize.FASTOCTREE, PIL.Image.Dither.NONE
        picture.quantize(COLOURS, method, dither=dither).save(file, 'PNG', optimize=True)
        return file.getvalue()


def _figure(panels: Sequence[Panel], height: float) -> Figure:
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.9 * columns, height * rows), layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.06)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for ax in places[len(panels) :]:
        ax.remove()
    for ax, panel in zip(places[: len(panels)], panels, strict=True):
        _draw(ax, panel)
    return figure


def _draw(ax: Axes, panel: Panel) -> None:
    ax.spines[['top', 'right']].set_visible(False)
    ax.spines[['left', 'bottom']].set_color('#9ca3af')
    ax.tick_params(which='both', colors=INK, labelsize=8, length=3)
    ax.grid(axis='y', color=RULE, linewidth=0.7)
    ax.set_axisbelow(True)
    panel(ax)
    # Users name runs, so a $ in a text is not mathematics; only logarithmic tick labels are.
    legend = ax.get_legend()
    for text in (ax.title, *ax.texts, *(legend.get_texts() if legend else ())):
        text.set_parse_math(False)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(size=9, color=INK)


def colours(reports: Sequence[Report]) -> dict[str, str]:
    """Returns a colour per branch, the same in every figure: the role's colour for the first branch of a role."""
    spare = iter(EXTRA_COLOURS * 9)
    result: dict[str, str] = {}
    for run in (run for report in reports for run in report.runs):
        if run.name not in result:
            colour = ROLE_COLOURS.get(run.role)
            result[run.name] = next(spare) if colour is None or colour in result.values() else colour
    return result


def of_the_first(reports: Sequence[object]) -> str:
    """Returns the end of a caption for a figure that shows only the first of several seeds."""
    return ' Of several seeds, the first.' if len(reports) > 1 else ''
