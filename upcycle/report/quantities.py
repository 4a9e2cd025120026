"""Costs and metrics as text."""

from upcycle.report.runs import Axis


def unit(axis: Axis, largest: float) -> tuple[float, str]:
    """Size and name of the unit in which values up to `largest` read well."""
    units = {
        Axis.FLOPS: [(10.0**p, f'{s}FLOPs') for p, s in ((21, 'Z'), (18, 'E'), (15, 'P'), (12, 'T'), (9, 'G'))],
        Axis.SECONDS: [(86400.0, 'days'), (3600.0, 'hours'), (60.0, 'min')],
        Axis.STEPS: [],
    }[axis]
    return next((u for u in units if abs(largest) >= 2 * u[0]), (1.0, axis.word))


def extra_text(flops: float, sunk: float) -> str:
    """Extra FLOPs, and their share of the sunk ones."""
    share = f' ({flops / sunk:.1%} of the sunk cost)' if sunk else ''
    return f'+{cost_text(flops, Axis.FLOPS)}{share}'


def cost_text(value: float | None, axis: Axis) -> str:
    """A cost in a unit in which it reads well."""
    if not value:
        return '–' if value is None else '0'
    size, name = unit(axis, value)
    return f'{value:,.0f}' if axis is Axis.STEPS else f'{value / size:,.3g} {name}'


def metric_text(value: float | None, metric: str) -> str:
    """A loss, or a share in per cent."""
    return '–' if value is None else f'{value:.4f}' if metric == 'loss' else f'{value:.2%}'
