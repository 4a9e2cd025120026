"""The report as an HTML page."""

import html
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from upcycle.cost import UTILIZATION
from upcycle.errors import writing_to
from upcycle.report.claims import Verdict
from upcycle.report.claims import rows as claim_rows
from upcycle.report.compare import Report, compare_seeds, warnings_of
from upcycle.report.headlines import headlines
from upcycle.report.plots import ends, experts, quality, steps
from upcycle.report.plots.figure import Plot, of_the_first
from upcycle.report.runs import Run
from upcycle.report.tables import Table, tables_of, write_csv

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
figure img { width: 100%; background: #fff; border: 1px solid var(--rule); border-radius: 6px; box-sizing: border-box;
  padding: .3rem; } figure.narrow img { max-width: 36rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
li { margin: .3rem 0; } .warning { border-left: 3px solid #d55e00; padding-left: .8rem; }
dt { color: var(--soft); font-size: .88rem; margin-top: .6rem; } dd { margin: 0; }
pre { background: var(--code); padding: .7rem; border-radius: 6px; overflow-x: auto;
  font-size: .82rem; margin: .2rem 0; }
"""


def write_report(
    seeds: Sequence[Mapping[str, Run]],
    out_dir: str | pathlib.Path,
    title: str,
    notes: Mapping[str, str] | None = None,
    verdicts: Sequence[Verdict] = (),
    first: Sequence[Plot] = (),
    tables: Mapping[str, Table] | None = None,
    texts: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes `report.html`, `report.csv` and the figures of the page, one PNG each.

    Args:
      seeds: the branches of one dense checkpoint by name, one mapping per seed.
      out_dir: folder, made if absent.
      title: the page's heading.
      notes: how to reproduce the report, shown as given; `evaluated_on` is also shown in captions.
      verdicts: verdicts on the paper's claims.
      first: plots shown before the standard ones.
      tables: more tables, by title, shown after the verdicts.
      texts: what the models have generated, by the names of their branches.

    Returns:
      The path of `report.html`.
    """
    notes = notes or {}
    reports = compare_seeds(seeds)
    out = pathlib.Path(out_dir)
    main = [*first, *quality.main_plots(reports, notes.get('evaluated_on'))]
    others = [
        *ends.step_zero_plot(reports),
        *quality.drop_plot(reports),
        *quality.from_zero_plot(reports),
        *experts.expert_plots(reports),
        steps.schedule_plot(reports),
        steps.throughput_plot(reports),
    ]
    parts = [
        *_head(title, reports),
        *_claims(verdicts),
        *_tables(tables or {}),
        '<h2>Quality against extra cost</h2>',
        *_figures(main),
        *_tables(tables_of(reports)),
        _NUMBERS,
        *_figures(others),
        *_typical_tokens(reports),
        *_generated(texts or {}),
        *_receipts(reports),
        *_reproduction(reports, notes),
    ]
    path = out / 'report.html'
    with writing_to(out, 'name another --out'):
        out.mkdir(parents=True, exist_ok=True)
        for plot in [*main, *others]:
            (out / f'{plot.key}.png').write_bytes(plot.png())
        write_csv(reports, out / 'report.csv')
        path.write_text('\n'.join(parts), encoding='utf-8', errors='backslashreplace')
    return path


_NUMBERS = (
    '<p>Loss and accuracy are validation values. Costs count from the dense checkpoint (MoE from scratch: its '
    'whole cost less that of the checkpoint). Core-days are what the FLOPs would take on cores of TPU v4 at '
    f'{UTILIZATION:.0%} of their peak: an estimate. Values at equal cost are interpolated linearly between evaluations, at '
    'the smallest extra cost that the dense continuation and every upcycled run reached (seeds: each its own, '
    'the first shown); an interval is the 95% '
    't-interval of the mean paired difference over seeds. '
    'Unrounded, per seed: <a href="report.csv">report.csv</a>. The pictures are files in the folder of this page: copy the '
    'whole folder.</p><h2>What happened inside</h2>'
)


def _head(title: str, reports: Sequence[Report]) -> Iterator[str]:
    e = html.escape
    yield '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<title>{e(title)}</title><style>{STYLE}</style></head><body><h1>{e(title)}</h1>'
    yield from (f'<p class="warning">{e(warning)}</p>' for warning in warnings_of(reports))
    yield f'<ul>{"".join(f"<li>{e(line)}</li>" for line in headlines(reports))}</ul>'


def _claims(verdicts: Sequence[Verdict]) -> Iterator[str]:
    if not verdicts:
        return
    head = ['claim', 'metric', 'difference', 'seeds', 'verdict', 'paper']
    yield f'<h2>Claims of the paper</h2>{_html_table((head, claim_rows(verdicts)))}'
    yield (
        '<p>Branches are compared where each has spent the same extra FLOPs, over the last twentieth before that point. A claim '
        'holds, or does not, where the 95% t-interval of the mean difference, paired by seed, excludes zero; a claim of no '
        'difference where that interval lies within the bounds it names, or outside.</p>'
    )


def _tables(tables: Mapping[str, Table]) -> Iterator[str]:
    for name, table in tables.items():
        yield f'<h2>{html.escape(name)}</h2>{_html_table(table)}'


def _generated(texts: Mapping[str, str]) -> Iterator[str]:
    if not texts:
        return
    yield '<h2>What the models write</h2><dl>'
    for name, text in texts.items():
        yield f'<dt>{html.escape(name)}</dt><dd><pre>{html.escape(text)}</pre></dd>'
    yield '</dl>'


def _reproduction(reports: Sequence[Report], notes: Mapping[str, str]) -> Iterator[str]:
    e = html.escape
    yield '<h2>How to reproduce</h2><dl>'
    for key, value in notes.items():
        shown = f'<pre>{e(value)}</pre>' if '\n' in value or key.startswith('command') else e(value)
        yield f'<dt>{e(key.replace("_", " "))}</dt><dd>{shown}</dd>'
    for seed, report in enumerate(reports, 1):
        for run in report.runs:
            words = f'{run.role.value}{_of_seed(seed, reports)}'
            yield f'<dt>{e(run.name)} ({words})</dt><dd><code>{e(str(run.path))}</code></dd>'
    yield '</dl></body></html>'


def _of_seed(seed: int, reports: Sequence[Report]) -> str:
    return f', seed {seed}' if len(reports) > 1 else ''


def _figures(plots: Sequence[Plot]) -> Iterator[str]:
    for plot in plots:
        title, name = html.escape(plot.title), f'{plot.key}.png'
        narrow = ' class="narrow"' if len(plot.panels) == 1 else ''
        yield f'<h3>{title}</h3><figure{narrow}><a href="{name}"><img alt="{title}" src="{name}"></a>'
        yield f'<figcaption>{html.escape(plot.caption)}</figcaption></figure>'


def _html_table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return '<tr>' + ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells) + '</tr>'

    head, body = table
    return f'<div class="wide"><table>{line(head, "th")}{"".join(line(row, "td") for row in body)}</table></div>'


def _receipts(reports: Sequence[Report]) -> Iterator[str]:
    for seed, report in enumerate(reports, 1):
        for run in report.runs:
            if run.receipt:
                yield from _receipt(run, _of_seed(seed, reports))


def _receipt(run: Run, seed: str) -> Iterator[str]:
    """Shows the step-0 function check. Any key may be missing: `convert` leaves parts pending."""
    e, receipt = html.escape, run.receipt if isinstance(run.receipt, Mapping) else {}
    source, check = _part(receipt, 'source'), _part(receipt, 'function_check')
    yield f'<h2>Receipt of {e(run.name)}{e(seed)}</h2><p>'
    facts = {'operator': receipt.get('operator'), 'seed': receipt.get('seed')}
    facts |= {'dense checkpoint': source.get('path'), 'step': source.get('step')}
    whole = _part(check, 'whole_model')
    facts |= {
        f'{kind} loss at step 0': whole.get(f'{kind}_loss', check.get('whole_model')) for kind in ('dense', 'sparse')
    }
    yield '; '.join(f'{e(k)}: <b>{e(_fact(v))}</b>' for k, v in facts.items() if v is not None) + '.</p>'
    if layers := _part(check, 'layers'):
        words = {
            'covered': 'tokens covered',
            'max_abs_difference_covered': 'max |MoE − dense|, covered',
            'max_abs_on_uncovered': 'max |MoE|, uncovered',
            'ratio': 'MoE / dense',
        }
        body = [[name, *(_fact(_part(layers, name).get(key)) for key in words)] for name in layers]
        yield _html_table((['layer', *words.values()], body))


def _part(of: object, key: str) -> Mapping[str, Any]:
    """Returns a mapping in a mapping; an empty one if either is something else."""
    value = of.get(key) if isinstance(of, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _fact(value: object) -> str:
    return '–' if value is None else f'{value:.4g}' if isinstance(value, float) else str(value)


def _typical_tokens(reports: Sequence[Report]) -> Iterator[str]:
    """Shows, for every run with DIVERSITY_PERIOD, the layer with the largest token information at the last evaluation."""
    tables = [table for run in reports[0].runs if (table := _typical_tokens_of(run)) is not None]
    if not tables:
        return
    yield '<h3>What each expert reads</h3><p>In the layer whose experts say most of their tokens, at the last look: how '
    yield 'many kinds of token an expert reads in effect, and those that set it apart from the rest, the strongest first '
    yield f'(numbers: class labels).{of_the_first(reports)}</p>'
    for title, table in tables:
        yield f'<details><summary>{html.escape(title)}</summary>{_html_table(table)}</details>'


def _typical_tokens_of(run: Run) -> tuple[str, Table] | None:
    """Returns the title and the table of one run, or None."""
    last = next((r for r in reversed(run.split('diversity')) if 'experts/token_information' in r), {})
    layers = [key.rpartition('/')[0] for key in last if key.endswith('/typical_tokens')]
    if not layers:
        return None
    layer = max(layers, key=lambda layer: last[f'{layer}/token_information'])
    kinds, tokens = last[f'{layer}/token_kinds'], last[f'{layer}/typical_tokens']
    title = f'{run.name}, {layer.removeprefix("experts/")}: {last[f"{layer}/token_information"]:.3f} nats'
    body = [[str(i), f'{kinds[i]:.3g}', '   '.join(map(repr, words)) or '–'] for i, words in enumerate(tokens)]
    return title, (['expert', 'kinds of token', 'typical'], body)
