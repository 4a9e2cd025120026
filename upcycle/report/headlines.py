"""The comparison in sentences."""

import statistics
from collections.abc import Iterator, Sequence

from upcycle.report.compare import Paired, Report, Row, mean_rows, paired, reaches
from upcycle.report.runs import Axis, Role
from upcycle.report.sample import Sample
from upcycle.report.text import extra_text


def headlines(reports: Sequence[Report]) -> list[str]:
    """Describes the gap at equal FLOPs, when a run passes the dense continuation, and when MoE from scratch catches up."""
    report, lines = reports[0], []
    base = report.find(Role.DENSE_CONTINUATION)
    rows = {row.branch: row for row in mean_rows(reports)}
    for gap in paired(reports):
        run = next((r for r in report.runs if r.name == gap.branch and r.role is Role.UPCYCLED), None)
        if run is not None and gap.axis is Axis.FLOPS and gap.metric == 'loss':
            lines.append(_gap(report, gap, rows[run.name], rows[base.name]))
            lines += [_passing(reports, run.name, base.name), *_catching_up(reports, run.name)]
    return [line[0].upper() + line[1:] for line in lines]


def _gap(report: Report, gap: Paired, ours: Row, theirs: Row) -> str:
    """Describes the difference of two losses at equal FLOPs."""
    verdict = 'lower (better)' if gap.mean < 0 else 'higher (worse)'
    values = ''
    if ours.loss_at_budget is not None and theirs.loss_at_budget is not None:
        values = f': {ours.loss_at_budget:.4f} against {theirs.loss_at_budget:.4f}'
    interval = ' (one seed, so no interval)'
    if gap.half_width is not None:
        settled = '' if gap.half_width < abs(gap.mean) else ': the seeds do not settle the sign'
        interval = f' (95% interval ± {gap.half_width:.4f} over seeds{settled})'
    return (
        f'At equal extra FLOPs, {extra_text(report.budget[Axis.FLOPS], report.sunk[Axis.FLOPS])}, the validation loss of '
        f'{ours.branch} is {abs(gap.mean):.4f} {verdict} than that of {theirs.branch}{values}{interval}.'
    )


def _passing(reports: Sequence[Report], name: str, base: str) -> str:
    """Describes from which cost a branch stays below another: the mean over the seeds in which it ends below."""
    runs = [{run.name: run for run in report.runs} for report in reports]
    costs = [r.passes(by[name], by[base]) for r, by in zip(reports, runs, strict=True) if {name, base} <= by.keys()]
    passed = [cost for cost in costs if cost is not None]
    if not passed:
        return f'{name} is not below {base} where the shorter of the two ends.'
    of = f', in {len(passed)} of {len(costs)} seeds' if len(costs) > 1 else ''
    mean = ' (mean)' if len(passed) > 1 else ''
    return f'{name} stays below {base} from {extra_text(statistics.fmean(passed), reports[0].sunk[Axis.FLOPS])}{mean} on{of}.'


def _catching_up(reports: Sequence[Report], name: str) -> Iterator[str]:
    """Describes the cost at which MoE from scratch reaches the final loss of a branch, as a share of the sunk cost."""
    costs = []
    for report in reports:
        scratch, sunk = report.find(Role.SCRATCH), report.sunk[Axis.FLOPS]
        run = next((run for run in report.runs if run.name == name), None)
        if scratch and sunk and run and len(target := run.curve('loss', Axis.FLOPS)[1]):
            cost = reaches(scratch.curve('loss', Axis.FLOPS), target[-1])
            costs.append(None if cost is None else cost / sunk)
    sample = Sample(values=tuple(costs))
    if costs and not sample.known:
        yield f'{reports[0].find(Role.SCRATCH).name} has not come down to the last loss of {name}.'
    elif costs:
        of = f' ({len(sample.known)} of {len(costs)} seeds)' if len(costs) > 1 else ''
        share = f"{sample.text('.0%')} of the dense checkpoint's cost"
        yield f'{reports[0].find(Role.SCRATCH).name} needs {share} to the last loss of {name}{of}.'
