"""The report as a page, a table on the console, and a CSV."""

import base64
import csv
import dataclasses
import html
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

import rich.box
import rich.console
import rich.markup
import rich.table
from etils import epath

from upcycle import files, outputs
from upcycle.cost import UTILIZATION
from upcycle.errors import UserError, writing_to
from upcycle.report.claims import Verdict
from upcycle.report.claims import rows as claim_rows
from upcycle.report.compare import Paired, Report, Row, half_width, mean_rows, paired, reaches
from upcycle.report.plots import Plot, main_plots, other_plots, unit
from upcycle.report.runs import Axis, Role, Run, load_run

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --rule: #e5e7eb; --back: #fdfdfc; --code: #f3f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --rule: #374151; --back: #16181d; --code: #22252c; }
}
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, figcaption { max-width: 46rem; } figure { margin: 1rem 0 2rem; }
figcaption { color: var(--soft); font-size: .88rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .6rem;
  margin-bottom: .5rem; }
.panels img { width: 100%; max-width: 36rem; background: #fff; border: 1px solid var(--rule); border-radius: 6px;
  box-sizing: border-box; padding: .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
li { margin: .3rem 0; } .warning { border-left: 3px solid #d55e00; padding-left: .8rem; }
dt { color: var(--soft); font-size: .88rem; margin-top: .6rem; } dd { margin: 0; }
pre { background: var(--code); padding: .7rem; border-radius: 6px; overflow-x: auto;
  font-size: .82rem; margin: .2rem 0; }
"""

Table = tuple[list[str], list[list[str]]]


def write_report(
    runs: Sequence[Run] | Sequence[Mapping[str, Run]],
    out_dir: str | pathlib.Path,
    title: str,
    notes: Mapping[str, str] | None = None,
    verdicts: Sequence[Verdict] = (),
    first: Sequence[Plot] = (),
    beside: Mapping[str, Table] | None = None,
) -> pathlib.Path:
    """Writes `report.html` (whole in itself), `report.csv` and one PNG per figure.

    Args:
      runs: the branches of one dense checkpoint; or one mapping of branch name to run per seed.
      out_dir: folder, made if absent.
      title: the page's heading.
      notes: how to reproduce, shown as given; `evaluated_on` also goes into the captions.
      verdicts: of the claims that the comparison was made to check.
      first: plots to be shown before those of every report.
      beside: more tables, by title, after the verdicts.

    Returns:
      The path of `report.html`.
    """
    notes = notes or {}
    reports = compare_seeds(runs)
    out = pathlib.Path(out_dir)
    main, others = [*first, *main_plots(reports, notes.get('evaluated_on'))], other_plots(reports)
    page = '\n'.join(_page(reports, title, notes, main, others, verdicts, beside or {}))
    path = out / 'report.html'
    with writing_to(out, 'name another --out'):
        out.mkdir(parents=True, exist_ok=True)
        for plot in [*main, *others]:
            (out / f'{plot.key}.png').write_bytes(plot.png())
        _write_csv(reports, out / 'report.csv')
        path.write_text(page, encoding='utf-8', errors='backslashreplace')
    return path


def compare_seeds(runs: Sequence[Run] | Sequence[Mapping[str, Run]]) -> list[Report]:
    """One report per seed; a mapping's keys become the names of its runs, so that seeds line up."""
    if not runs or isinstance(runs[0], Run):
        return [Report.compare(runs)]
    return [Report.compare([dataclasses.replace(run, name=n) for n, run in group.items()]) for group in runs]


def print_table(report: Report | Sequence[Report], console: rich.console.Console | None = None) -> None:
    """Prints headlines and tables; several reports are the seeds of one comparison."""
    reports = [report] if isinstance(report, Report) else list(report)
    console = console or rich.console.Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    for warning in _warnings(reports):
        console.print(f'Warning: {warning}', style='yellow', markup=False)
    for name, (head, body) in _tables(reports).items():
        table = rich.table.Table(title=name, title_justify='left', box=rich.box.SIMPLE_HEAD)
        for i, column in enumerate(head):
            table.add_column(column, justify='right' if i else 'left', overflow='fold')
        for row in body:
            table.add_row(*map(rich.markup.escape, row))
        console.print(table)
    for line in headlines(reports):
        console.print(f'- {line}', markup=False, highlight=False)


def headlines(reports: Sequence[Report]) -> list[str]:
    """The comparison in sentences: the gap at equal FLOPs, who passes whom and when, scratch's catching up."""
    report, lines = reports[0], []
    sunk, base = report.sunk[Axis.FLOPS], report.find(Role.DENSE_CONTINUATION)
    rows = {row.branch: row for row in mean_rows(reports)}
    for gap in paired(reports):
        run = next((r for r in report.runs if r.name == gap.branch and r.role is Role.UPCYCLED), None)
        if run is None or gap.axis is not Axis.FLOPS or gap.metric != 'loss':
            continue
        verdict = 'lower (better)' if gap.mean < 0 else 'higher (worse)'
        ours, theirs = rows[run.name].loss_at_budget, rows[base.name].loss_at_budget
        values = f': {ours:.4f} against {theirs:.4f}' if ours is not None and theirs is not None else ''
        interval = ' (one seed, so no interval)'
        if gap.half_width is not None:
            settled = '' if gap.half_width < abs(gap.mean) else ': the seeds do not settle the sign'
            interval = f' (95% interval ± {gap.half_width:.4f} over seeds{settled})'
        lines.append(
            f'At equal extra FLOPs, {_extra(report.budget[Axis.FLOPS], sunk)}, the validation loss of {run.name} is '
            f'{abs(gap.mean):.4f} {verdict} than that of {base.name}{values}{interval}.'
        )
        lines += [_passing(reports, run.name, base.name), *_catching_up(reports, run.name)]
    return [line[0].upper() + line[1:] for line in lines]


def _passing(reports: Sequence[Report], name: str, base: str) -> str:
    """From where on a branch stays below another: the mean over the seeds in which it ends below."""
    runs = [{run.name: run for run in report.runs} for report in reports]
    found = [r.passes(by[name], by[base]) for r, by in zip(reports, runs, strict=True) if {name, base} <= by.keys()]
    passed = [cost for cost in found if cost is not None]
    if not passed:
        return f'{name} is not below {base} where the shorter of the two ends.'
    of = f', in {len(passed)} of {len(found)} seeds' if len(found) > 1 else ''
    mean = ' (mean)' if len(passed) > 1 else ''
    return (
        f'{name} stays below {base} from {_extra(statistics.fmean(passed), reports[0].sunk[Axis.FLOPS])}{mean} on{of}.'
    )


def _catching_up(reports: Sequence[Report], name: str) -> Iterable[str]:
    """What a model from nothing needs to come to where a branch ends, of the dense checkpoint's cost: mean over seeds."""
    costs = []
    for report in reports:
        scratch, sunk = report.find(Role.SCRATCH), report.sunk[Axis.FLOPS]
        run = next((run for run in report.runs if run.name == name), None)
        if scratch and sunk and run and len(target := run.curve('loss', Axis.FLOPS)[1]):
            cost = reaches(scratch.curve('loss', Axis.FLOPS), target[-1])
            costs.append(None if cost is None else cost / sunk)
    known = [cost for cost in costs if cost is not None]
    if costs and not known:
        yield f'{reports[0].find(Role.SCRATCH).name} has not come down to the last loss of {name}.'
    elif costs:
        width = half_width(known)
        spread = '' if width is None else f' ± {width:.0%}'
        of = f' ({len(known)} of {len(costs)} seeds)' if len(costs) > 1 else ''
        share = f"{statistics.fmean(known):.0%}{spread} of the dense checkpoint's cost"
        yield f'{reports[0].find(Role.SCRATCH).name} needs {share} to the last loss of {name}{of}.'


def _warnings(reports: Sequence[Report]) -> list[str]:
    return list(dict.fromkeys(warning for report in reports for warning in report.warnings))


def _extra(flops: float, sunk: float) -> str:
    share = f' ({flops / sunk:.1%} of the sunk cost)' if sunk else ''
    return f'+{_quantity(flops, Axis.FLOPS)}{share}'


def _quantity(value: float | None, axis: Axis) -> str:
    if not value:
        return '–' if value is None else '0'
    size, name = unit(axis, value)
    return f'{value:,.0f}' if axis is Axis.STEPS else f'{value / size:,.3g} {name}'


def _value(value: float | None, metric: str) -> str:
    return '–' if value is None else f'{value:.4f}' if metric == 'loss' else f'{value:.2%}'


def _tables(reports: Sequence[Report]) -> dict[str, Table]:
    """Titles and the tables under them, as text."""
    budget = reports[0].budget.get(Axis.FLOPS)
    mean = f', mean over {len(reports)} seeds' if len(reports) > 1 else ''
    at = f'; at equal FLOPs (*): {_extra(budget, reports[0].sunk[Axis.FLOPS])}' if budget is not None else ''
    costs = ['+ steps', '+ FLOPs', '% sunk', '+ core-days', '+ time']
    head = ['branch', 'step', *costs, 'loss', 'accuracy', 'loss*', 'accuracy*']
    body = [
        [
            row.branch,
            _quantity(row.final_step, Axis.STEPS),
            _quantity(row.extra_steps, Axis.STEPS),
            _quantity(row.extra_flops, Axis.FLOPS),
            '–' if row.extra_flops_share is None else f'{row.extra_flops_share:.1%}',
            '–' if row.extra_core_days is None else f'{row.extra_core_days:.3g}',
            _quantity(row.extra_seconds, Axis.SECONDS),
            _value(row.loss, 'loss'),
            _value(row.accuracy, 'accuracy'),
            _value(row.loss_at_budget, 'loss'),
            _value(row.accuracy_at_budget, 'accuracy'),
        ]
        for row in mean_rows(reports)
    ]
    tables = {f'Branches{mean}{at}': (head, body)}
    differences = paired(reports)
    if differences:
        seeds = [f'seed {i}' for i in range(1, len(reports) + 1)] if len(reports) > 1 else []
        head = ['branch', 'at equal', 'budget', 'metric', *seeds, 'difference']
        tables['Branch minus dense continuation'] = head, [_difference(reports, p) for p in differences]
    if times := [row for run in reports[0].runs if (row := _times(run))]:
        head = ['branch', 'time', 'steps', 'waiting for data', 'evaluations', 'checkpoints']
        tables[f'Where the time went{" (first seed)" if len(reports) > 1 else ""}'] = head, times
    return tables


def _times(run: Run) -> list[str] | None:
    """The time in a run's loop and its shares; None where they were not logged."""
    last = next((record for record in reversed(run.records) if 'data_seconds' in record), None)
    if last is None:
        return None
    parts = [
        last['seconds'] - last['data_seconds'],
        *(last[f'{name}_seconds'] for name in ('data', 'evaluation', 'checkpoint')),
    ]
    total = sum(parts)
    return [run.name, _quantity(total, Axis.SECONDS), *(f'{part / total:.1%}' if total else '–' for part in parts)]


def _difference(reports: Sequence[Report], p: Paired) -> list[str]:
    def gap(value: float | None, sign: str = '+') -> str:
        if value is None:
            return '–'
        return f'{value:{sign}.4f}' if p.metric == 'loss' else f'{100 * value:{sign}.2f}'

    budget = _quantity(next(r.budget[p.axis] for r in reports if p.axis in r.budget), p.axis)
    seeds = [gap(value) for value in p.values] if len(reports) > 1 else []
    spread = f' ± {gap(p.half_width, "")}' if p.half_width is not None else ''
    words = {'loss': 'loss', 'accuracy': 'accuracy, points'}
    return [p.branch, p.axis.word, budget, words[p.metric], *seeds, gap(p.mean) + spread]


def _write_csv(reports: Sequence[Report], path: pathlib.Path) -> None:
    """All numbers unrounded, a line per seed and branch."""
    names = [field.name for field in dataclasses.fields(Row)]
    gaps = [(axis, metric) for axis in Axis for metric in ('loss', 'accuracy')]
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        extra = [f'{m}_difference_at_equal_{a.word.lower()}' for a, m in gaps]
        writer.writerow(['seed', *names, 'budget_flops', *extra])
        for seed, report in enumerate(reports, 1):
            for row in report.rows:
                found = report.differences.get(row.branch, {})
                values = [getattr(row, name) for name in names]
                values[names.index('role')] = row.role.value
                differences = [getattr(found[a], m) if a in found else None for a, m in gaps]
                writer.writerow([seed, *values, report.budget.get(Axis.FLOPS), *differences])


def _page(
    reports: Sequence[Report],
    title: str,
    notes: Mapping[str, str],
    main: Sequence[Plot],
    others: Sequence[Plot],
    verdicts: Sequence[Verdict],
    beside: Mapping[str, Table],
) -> Iterable[str]:
    e = html.escape
    yield '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<title>{e(title)}</title><style>{STYLE}</style></head><body><h1>{e(title)}</h1>'
    yield from (f'<p class="warning">{e(warning)}</p>' for warning in _warnings(reports))
    yield f'<ul>{"".join(f"<li>{e(line)}</li>" for line in headlines(reports))}</ul>'
    if verdicts:
        head = ['claim', 'metric', 'difference', 'seeds', 'verdict', 'paper']
        yield f'<h2>Claims of the paper</h2>{_html_table((head, claim_rows(verdicts)))}'
        yield (
            '<p>Branches are compared where each has spent the same FLOPs of its own, over the last twentieth before it. A claim '
            'holds, or does not, where the 95% t-interval of the mean difference, paired by seed, excludes zero; a claim of no '
            'difference where that interval lies within the bounds it names, or outside.</p>'
        )
    for name, table in beside.items():
        yield f'<h2>{e(name)}</h2>{_html_table(table)}'
    yield '<h2>Quality against extra cost</h2>'
    for plot in main:
        yield from _figure(plot)
    for name, table in _tables(reports).items():
        yield f'<h2>{e(name)}</h2>{_html_table(table)}'
    yield (
        '<p>Loss and accuracy are validation values. Costs count from the dense checkpoint (MoE from scratch: its '
        'whole cost less that of the checkpoint). Core-days are what the FLOPs would take on cores of TPU v4 at '
        f'{UTILIZATION:.0%} of their peak: an estimate. Values at equal cost are interpolated linearly between evaluations, at '
        'the smallest extra cost that the dense continuation and every upcycled run reached (seeds: each its own, '
        'the first shown); an interval is the 95% '
        't-interval of the mean paired difference over seeds. '
        'Unrounded, per seed: report.csv.</p><h2>What happened inside</h2>'
    )
    for plot in others:
        yield from _figure(plot)
    yield from _what_experts_read(reports)
    for seed, report in enumerate(reports, 1):
        for run in (run for run in report.runs if run.receipt):
            yield from _receipt(run, f', seed {seed}' if len(reports) > 1 else '')
    yield '<h2>How to reproduce</h2><dl>'
    for key, value in notes.items():
        shown = f'<pre>{e(value)}</pre>' if '\n' in value or key.startswith('command') else e(value)
        yield f'<dt>{e(key.replace("_", " "))}</dt><dd>{shown}</dd>'
    for i, report in enumerate(reports, 1):
        for run in report.runs:
            seed = f', seed {i}' if len(reports) > 1 else ''
            yield f'<dt>{e(run.name)} ({run.role.value}{seed})</dt><dd><code>{e(str(run.path))}</code></dd>'
    yield '</dl></body></html>'


def _figure(plot: Plot) -> Iterable[str]:
    yield f'<h3>{html.escape(plot.title)}</h3><figure><div class="panels">'
    for svg in plot.svg():
        data = base64.b64encode(svg).decode()
        yield f'<img alt="{html.escape(plot.title)}" src="data:image/svg+xml;base64,{data}">'
    yield f'</div><figcaption>{html.escape(plot.caption)}</figcaption></figure>'


def _html_table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return '<tr>' + ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells) + '</tr>'

    head, body = table
    return f'<div class="wide"><table>{line(head, "th")}{"".join(line(row, "td") for row in body)}</table></div>'


def _receipt(run: Run, seed: str) -> Iterable[str]:
    """The step-0 function check: every key may be missing, since `convert` leaves parts pending."""

    def part(of: object, key: str) -> Mapping:
        value = of.get(key) if isinstance(of, Mapping) else None
        return value if isinstance(value, Mapping) else {}

    e, receipt = html.escape, run.receipt if isinstance(run.receipt, Mapping) else {}
    source, check = part(receipt, 'source'), part(receipt, 'function_check')
    yield f'<h2>Receipt of {e(run.name)}{e(seed)}</h2><p>'
    facts = {'operator': receipt.get('operator'), 'seed': receipt.get('seed')}
    facts |= {'dense checkpoint': source.get('path'), 'step': source.get('step')}
    whole = part(check, 'whole_model')
    facts |= {
        f'{kind} loss at step 0': whole.get(f'{kind}_loss', check.get('whole_model')) for kind in ('dense', 'sparse')
    }
    yield '; '.join(f'{e(k)}: <b>{e(_fact(v))}</b>' for k, v in facts.items() if v is not None) + '.</p>'
    if layers := part(check, 'layers'):
        words = {
            'covered': 'tokens covered',
            'max_abs_difference_covered': 'max |MoE − dense|, covered',
            'max_abs_on_uncovered': 'max |MoE|, uncovered',
            'ratio': 'MoE / dense',
        }
        body = [[name, *(_fact(part(layers, name).get(key)) for key in words)] for name in layers]
        yield _html_table((['layer', *words.values()], body))


def _what_experts_read(reports: Sequence[Report]) -> Iterable[str]:
    """Of every run with DIVERSITY_PERIOD the layer whose experts say most of their tokens, at the last look."""
    tables = {}
    for run in reports[0].runs:
        look = next((r for r in reversed(run.split('diversity')) if 'experts/token_information' in r), {})
        layers = [key.rpartition('/')[0] for key in look if key.endswith('/typical_tokens')]
        if layers:
            layer = max(layers, key=lambda layer: look[f'{layer}/token_information'])
            kinds, tokens = look[f'{layer}/token_kinds'], look[f'{layer}/typical_tokens']
            title = f'{run.name}, {layer.removeprefix("experts/")}: {look[f"{layer}/token_information"]:.3f} nats'
            tables[title] = [
                [str(i), f'{kinds[i]:.3g}', '   '.join(map(repr, words)) or '–'] for i, words in enumerate(tokens)
            ]
    if not tables:
        return
    many = ' Of several seeds, the first.' if len(reports) > 1 else ''
    yield '<h3>What each expert reads</h3><p>In the layer whose experts say most of their tokens, at the last look: how '
    yield 'many kinds of token an expert reads in effect, and those that set it apart from the rest, the strongest first '
    yield f'(numbers: labels of images).{many}</p>'
    for title, body in tables.items():
        head = ['expert', 'kinds of token', 'typical']
        yield f'<details><summary>{html.escape(title)}</summary>{_html_table((head, body))}</details>'


def _fact(value: object) -> str:
    return '–' if value is None else f'{value:.4g}' if isinstance(value, float) else str(value)


def report_main(run_dirs: Sequence[str], out: str) -> pathlib.Path:
    """`upcycle report`: reads run folders, prints the table, writes the report into `out`.

    Args:
      run_dirs: run folders, or folders that hold run folders at any depth. Runs under folders called `seed_0`,
        `seed_1`, ... (or themselves so called) are seeds of one branch; a run without such a name serves every seed.
      out: folder of the report.

    Returns:
      The path of `report.html`.
    """
    outputs.check('--out', out, outputs.Kind.FOLDER, local=True)
    folders: dict[epath.Path, None] = {}
    for given in map(files.absolute, run_dirs):
        if (given / 'metrics.jsonl').is_file():
            found = [given]
        else:
            found = sorted(folder for folder, _, names in given.walk() if 'metrics.jsonl' in names)
        if not found:
            raise UserError(f'{given} holds no metrics.jsonl; give the MODEL_DIR of a run or a folder of such.')
        folders |= dict.fromkeys(found)
    seeds: dict[str, dict[str, Run]] = {}
    pattern = re.compile(r'[ _-]?seed[ _=-]?(\d+)', re.IGNORECASE)
    for folder in folders:
        seed = pattern.search('/'.join(folder.resolve().parts[-2:]))
        run = load_run(folder)
        name = pattern.sub('', run.name).strip(' -') or run.role.value
        group = seeds.setdefault(seed.group(1) if seed else '', {})
        if name in group:
            name = f'{folder.resolve().parent.name}/{name}'
        group[name] = run
    shared = seeds.pop('', {})
    order = list(Role)
    groups = [
        dict(sorted({**shared, **group}.items(), key=lambda item: order.index(item[1].role)))
        for _, group in sorted(seeds.items(), key=lambda item: int(item[0]))
    ] or [dict(sorted(shared.items(), key=lambda item: order.index(item[1].role)))]
    print_table(compare_seeds(groups))
    command = 'upcycle report ' + ' '.join(run_dirs) + f' --out {out}'
    return write_report(
        groups, out, 'Sparse upcycling: what the extra cost bought', {'command of this report': command}
    )
