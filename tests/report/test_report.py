"""The numbers of a report on runs with linear curves, and damaged or unusual run folders."""

import csv
import dataclasses
import json
import math
import re

import matplotlib.figure
import numpy as np
import pytest
import rich.console

from upcycle.errors import UserError
from upcycle.report.command import report_main
from upcycle.report.compare import Report, interpolate, mean_rows, paired, reaches
from upcycle.report.html import write_report
from upcycle.report.plots.experts import load_over_steps
from upcycle.report.plots.figure import Plot
from upcycle.report.plots.steps import throughput_plot
from upcycle.report.runs import Axis, Role, Run, load_run
from upcycle.report.tables import print_table
from upcycle.report.text import unit

START, SUNK_FLOPS, SUNK_SECONDS = 1000, 1000 * 3e12, 1000 / 8.0
LAYERS = ('encoder/layers_1', 'decoder/layers_1')


def write_run(folder, start, steps, flops, rate, loss, experts=False, sunk=(0.0, 0.0), every=100):
    """Writes a run with validation loss `loss(steps since start)` and a tenth of it as accuracy."""
    folder.mkdir(parents=True)
    lines = []
    for k in range(0, steps + 1, every):
        common = {'step': start + k, 'seconds': k / rate, 'flops': k * flops, 'start_step': start}
        common |= {'sunk_flops': sunk[0], 'sunk_seconds': sunk[1]}
        if experts:
            common |= {'experts/router_entropy': 2.0, 'experts/router_confidence': 0.2}
            for layer in LAYERS:
                common[f'experts/{layer}/fraction_tokens_left_behind'] = 0.1
                common[f'experts/{layer}/load'] = [0.25, 0.5, 0.125, 0.125]
        train = {'cross_entropy_loss': loss(k), 'learning_rate': 0.01, 'gradient_norm': 1.0, 'steps_per_second': rate}
        lines.append(common | train | {'split': 'train', 'loss': loss(k)})
        lines.append(common | {'split': 'validation', 'loss': loss(k), 'accuracy': loss(k) / 10})
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


def write_branches(root, shift=0.0, experts=True):
    sunk = (SUNK_FLOPS, SUNK_SECONDS)
    write_run(root / 'dense', 0, START, 3e12, 8.0, lambda k: 5.0 - 0.002 * k)
    write_run(root / 'dense_continuation', START, 800, 3e12, 8.0, lambda k: 3.0 - 1e-4 * k, sunk=sunk)
    upcycled = write_run(root / 'upcycled', START, 700, 4.7e12, 5.0, lambda k: 3.1 + shift - 4e-4 * k, experts, sunk)
    receipt = {
        'operator': 'copy',
        'function_check': {'layers': {LAYERS[0]: {'covered': 0.86}}, 'whole_model': 'pending'},
    }
    (upcycled / 'receipt.json').write_text(json.dumps(receipt))
    write_run(root / 'moe_from_scratch', 0, 1800, 4.7e12, 5.0, lambda k: 4.0 - 5e-4 * k, experts)
    return [load_run(folder) for folder in sorted(root.iterdir())]


@pytest.fixture
def runs(tmp_path):
    return write_branches(tmp_path / 'runs')


@pytest.fixture
def not_drawn(monkeypatch):
    """Skips drawing, which takes most of a test's time."""
    monkeypatch.setattr(Plot, 'png', lambda self: b'')


def one_seed(*runs):
    return [{run.name: run for run in runs}]


def test_roles_come_from_names_and_else_from_metrics(tmp_path, runs):
    assert {run.name: run.role for run in runs} == {
        'dense': Role.DENSE,
        'dense continuation': Role.DENSE_CONTINUATION,
        'upcycled': Role.UPCYCLED,
        'moe from scratch': Role.SCRATCH,
    }
    sunk = (SUNK_FLOPS, SUNK_SECONDS)
    for name, start, experts, role in (
        ('a', 0, False, Role.DENSE),
        ('b', 0, True, Role.SCRATCH),
        ('c', 10, False, Role.DENSE_CONTINUATION),
        ('d', 10, True, Role.UPCYCLED),
    ):
        folder = write_run(
            tmp_path / name, start, 200, 1e12, 1.0, lambda k: 1.0, experts, sunk if start else (0.0, 0.0)
        )
        assert load_run(folder).role is role


def test_table_at_the_end_and_at_equal_cost(runs):
    report = Report(runs)
    rows = {row.branch: row for row in report.rows}
    up, dense = rows['upcycled'], rows['dense continuation']
    assert report.sunk == {Axis.FLOPS: SUNK_FLOPS, Axis.STEPS: START, Axis.SECONDS: SUNK_SECONDS}
    assert (up.final_step, up.extra_steps, up.extra_seconds) == (1700, 700, 140.0)
    assert up.extra_flops == pytest.approx(700 * 4.7e12, rel=1e-12)
    assert up.extra_flops_share == pytest.approx(700 * 4.7e12 / SUNK_FLOPS, abs=1e-9)
    assert up.total_flops == pytest.approx(SUNK_FLOPS + 700 * 4.7e12, rel=1e-12)
    assert up.loss == pytest.approx(3.1 - 0.28, abs=1e-9)
    assert dense.loss == pytest.approx(2.92, abs=1e-9)

    # The continuation stops first in FLOPs and seconds, the upcycled run in steps.
    assert report.budget == {Axis.FLOPS: 800 * 3e12, Axis.STEPS: 700, Axis.SECONDS: 100.0}
    steps = {Axis.FLOPS: (800 * 3 / 4.7, 800), Axis.STEPS: (700, 700), Axis.SECONDS: (500, 800)}
    for axis, (ours, theirs) in steps.items():
        gap = (3.1 - 4e-4 * ours) - (3.0 - 1e-4 * theirs)
        assert report.difference('upcycled', axis, 'loss') == pytest.approx(gap, abs=1e-9)
        assert report.difference('upcycled', axis, 'accuracy') == pytest.approx(gap / 10, abs=1e-9)
    assert up.loss_at_budget == pytest.approx(3.1 - 4e-4 * 800 * 3 / 4.7, abs=1e-9)
    assert dense.loss_at_budget == dense.loss


def test_where_the_time_went(tmp_path, runs, capsys):
    console = rich.console.Console(width=200)
    print_table([Report(runs)], console)
    assert 'Where the time went' not in capsys.readouterr().out
    folder = write_run(tmp_path / 'timed', 0, 100, 1e12, 1.0, lambda k: 1.0)
    spent = {'seconds': 80.0, 'data_seconds': 20.0, 'evaluation_seconds': 15.0, 'checkpoint_seconds': 5.0}
    lines = [json.loads(line) | spent for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    print_table([Report([load_run(folder)])], console)
    out = capsys.readouterr().out.split('Where the time went')[1]
    assert re.search(r'timed +100 seconds +60\.0% +20\.0% +15\.0% +5\.0%', out), out
    assert 'Speed' not in out


def test_speed(tmp_path, capsys):
    folder = write_run(tmp_path / 'timed', 0, 100, 1e12, 2.0, lambda k: 1.0)
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    for line in lines:
        if line['split'] == 'train':
            line |= {'tokens_per_second_per_device': 10.0 * line['step'], 'device_busy': 0.975}
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    reports = [Report([load_run(folder)])]
    print_table(reports, rich.console.Console(width=200))
    middle = 10 * np.median([line['step'] for line in lines if line['split'] == 'train'])
    assert re.search(rf'timed +2 +{middle:g} tokens +– +97\.5%', capsys.readouterr().out.split('Speed')[1])
    assert len(throughput_plot(reports).panels) == 3


def test_scratch_is_charged_its_whole_budget(runs):
    report = Report(runs)
    row = next(row for row in report.rows if row.role is Role.SCRATCH)
    assert row.extra_steps == 800
    assert row.extra_flops == pytest.approx(1800 * 4.7e12 - SUNK_FLOPS, rel=1e-12)
    assert row.total_flops == pytest.approx(1800 * 4.7e12, rel=1e-12)
    at = (SUNK_FLOPS + 800 * 3e12) / 4.7e12
    assert row.loss_at_budget == pytest.approx(4.0 - 5e-4 * at, abs=1e-9)
    x, _ = report.curve(report.find(Role.SCRATCH), 'loss', Axis.FLOPS)
    assert x[0] == -SUNK_FLOPS


def test_dense_checkpoint_crossing_and_catching_up(runs):
    report = Report(runs)
    assert report.dense == pytest.approx({'loss': 3.0, 'accuracy': 0.3}, abs=1e-9)
    up, base = report.find(Role.UPCYCLED), report.find(Role.DENSE_CONTINUATION)
    assert report.passes(up, base, Axis.STEPS) == pytest.approx(0.1 / 3e-4, abs=1e-9)
    assert report.passes(base, up, Axis.STEPS) is None
    scratch = report.find(Role.SCRATCH).curve('loss', Axis.STEPS)
    assert reaches(scratch, 3.53) == pytest.approx(940, abs=1e-6)
    assert reaches(scratch, 1.0) is None
    assert interpolate(scratch, 1801) is None


def test_a_dense_run_that_went_on_is_read_at_the_branch_point(tmp_path, runs):
    longer = load_run(write_run(tmp_path / 'longer', 0, 2 * START, 3e12, 8.0, lambda k: 5.0 - 0.002 * k), Role.DENSE)
    others = [run for run in runs if run.role is not Role.DENSE]
    row = Report([longer, *others]).rows[0]
    assert (row.final_step, row.loss, row.extra_flops) == (START, pytest.approx(3.0, abs=1e-9), 0)


def test_sunk_cost_comes_from_the_dense_run_when_branches_do_not_say(tmp_path):
    dense = load_run(write_run(tmp_path / 'dense', 0, START, 3e12, 8.0, lambda k: 3.0))
    more = load_run(write_run(tmp_path / 'continued', START, 200, 3e12, 8.0, lambda k: 3.0))
    report = Report([dense, more])
    assert report.sunk == pytest.approx({Axis.FLOPS: SUNK_FLOPS, Axis.STEPS: START, Axis.SECONDS: SUNK_SECONDS})


def test_different_starting_points_are_said(tmp_path, runs):
    late = write_run(tmp_path / 'upcycled_late', 2 * START, 700, 4.7e12, 5.0, lambda k: 3.0, True, (1e15, 1.0))
    (warning,) = Report([*runs, load_run(late)]).warnings
    assert 'upcycled late at 2,000' in warning
    assert not Report(runs).warnings


def test_a_run_in_progress(tmp_path, runs, not_drawn):
    metrics = runs[-1].path / 'metrics.jsonl'
    text = metrics.read_text()
    metrics.write_bytes((text + '{"step": 9999, "loss": "é').encode()[:-1])
    assert load_run(runs[-1].path).records == runs[-1].records
    metrics.write_text('{"step": 1,\n' + text)
    with pytest.raises(UserError, match=re.escape(f'{metrics}, line 1')):
        load_run(runs[-1].path)
    metrics.write_text(json.dumps({'step': START, 'split': 'train', 'start_step': START, 'loss': math.nan}) + '\n')
    path = write_report(one_seed(*runs[:-1], load_run(runs[-1].path)), tmp_path / 'out', 'half a run')
    assert 'upcycled' in path.read_text()


def test_user_errors_name_the_path(tmp_path, runs):
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_run(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'metrics.jsonl').write_text('')
    with pytest.raises(UserError, match=re.escape(str(tmp_path / 'empty'))):
        load_run(tmp_path / 'empty')
    with pytest.raises(UserError, match='nowhere'):
        report_main([str(tmp_path / 'nowhere')], str(tmp_path / 'out'))
    with pytest.raises(UserError, match='upcycled'):
        Report([runs[-1], runs[-1]])
    with pytest.raises(UserError):
        Report([])


def test_the_page_refers_to_files_of_its_folder_only(tmp_path, runs):
    notes = {'evaluated_on': '65,536 tokens', 'command': 'upcycle quickstart\n--out "<here>"'}
    path = write_report(one_seed(*runs), tmp_path / 'out', 'A <title>', notes)
    page = path.read_text()
    assert not re.search(r'https?:|<script|<link|@import|url\(|data:', page)
    names = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {'report.html', *names} == {file.name for file in path.parent.iterdir()}
    assert all((path.parent / name).stat().st_size for name in names)
    assert 'A &lt;title&gt;' in page and '&lt;here&gt;' in page
    assert 'Evaluated on 65,536 tokens' in page
    assert 'Receipt of upcycled' in page and 'pending' in page and '0.86' in page
    with (tmp_path / 'out' / 'report.csv').open() as file:
        rows = {row['branch']: row for row in csv.DictReader(file)}
    expected = Report(runs).difference('upcycled', Axis.FLOPS, 'loss')
    assert float(rows['upcycled']['loss_difference_at_equal_flops']) == expected
    assert rows['dense']['loss_difference_at_equal_flops'] == ''


def test_without_experts_metrics_or_other_branches(tmp_path, not_drawn):
    write_branches(tmp_path / 'runs', experts=False)
    assert report_main([str(tmp_path / 'runs')], str(tmp_path / 'out')).is_file()
    assert not list((tmp_path / 'out').glob('expert_load*'))
    path = report_main([str(tmp_path / 'runs' / 'dense')], str(tmp_path / 'alone'))
    assert 'nothing logged yet' not in path.read_text()


def test_load_over_time_is_that_of_the_least_even_layer_and_of_the_last_number_of_experts(tmp_path):
    even, last = [0.25] * 4, [0.4, 0.3, 0.3, 0.0]
    records = [
        {'split': 'train', 'step': step, f'experts/{LAYERS[0]}/load': even, f'experts/{LAYERS[1]}/load': load}
        for step, load in ((10, [0.5, 0.5]), (20, [0.3, 0.3, 0.2, 0.2]), (40, last))
    ]
    ax = matplotlib.figure.Figure().add_subplot()
    load_over_steps(Run('grow', tmp_path, Role.UPCYCLED, tuple(records)), ax)
    assert ax.get_title().startswith('grow: ')
    (drawn,) = ax.collections
    np.testing.assert_allclose(drawn.get_array(), np.array([[0.3, 0.3, 0.2, 0.2], last]).T * 4)
    assert ax.get_xlim() == (19.5, 40.5)


def test_what_experts_read_is_of_the_layer_that_says_most_at_the_last_look(tmp_path, runs, not_drawn):
    def look(step, value):
        found = {'experts/token_information': value}
        for layer, share, word in zip(LAYERS, (1.0, 3.0), ('<of>', 'def'), strict=True):
            found[f'experts/{layer}/token_information'] = share * value
            found[f'experts/{layer}/token_kinds'] = [2.5, 1.0]
            found[f'experts/{layer}/typical_tokens'] = [[word], []]
        return found | {'split': 'diversity', 'step': step}

    looked = dataclasses.replace(runs[-1], records=(*runs[-1].records, look(1100, 0.25), look(1200, 0.5)))
    page = write_report(one_seed(*runs[:-1], looked), tmp_path / 'out', 'looked').read_text()
    assert f'<summary>{looked.name}, {LAYERS[1]}: 1.500 nats</summary>' in page
    assert '<td>0</td><td>2.5</td><td>&#x27;def&#x27;</td>' in page and '<td>1</td><td>1</td><td>–</td>' in page
    assert '&lt;of&gt;' not in page
    assert 'What each expert reads' not in write_report(one_seed(*runs), tmp_path / 'none', 'not looked').read_text()


def test_seeds_are_paired(tmp_path, not_drawn):
    shifts = (0.0, 0.01, 0.05)
    for i, shift in enumerate(shifts):
        write_branches(tmp_path / 'runs' / f'seed_{i}', shift)
    path = report_main([str(tmp_path / 'runs')], str(tmp_path / 'out'))
    assert 'Thin lines: 3 seeds' in path.read_text() and 'seed 3' in path.read_text()

    reports = [
        Report([load_run(f) for f in sorted(folder.iterdir())]) for folder in sorted((tmp_path / 'runs').iterdir())
    ]
    pair = next(p for p in paired(reports) if (p.branch, p.axis, p.metric) == ('upcycled', Axis.STEPS, 'loss'))
    assert pair.values == pytest.approx([shift - 0.11 for shift in shifts], abs=1e-9)
    assert pair.mean == pytest.approx(0.02 - 0.11, abs=1e-9)
    # t(0.975, 2) = 4.302653 times the standard error of 0, 0.01, 0.05
    assert pair.half_width == pytest.approx(4.302653 * math.sqrt(0.0007 / 3), abs=1e-9)
    row = next(row for row in mean_rows(reports) if row.branch == 'upcycled')
    assert row.loss == pytest.approx(3.1 - 0.28 + 0.02, abs=1e-9)
    assert paired(reports[:1])[0].half_width is None


def test_a_dense_run_without_a_seed_serves_all_seeds(tmp_path, not_drawn):
    write_branches(tmp_path / 'runs')
    for i in range(2):
        for name in ('dense_continuation', 'upcycled'):
            source = tmp_path / 'runs' / name
            (tmp_path / 'all' / f'{name}_seed_{i}').mkdir(parents=True)
            (tmp_path / 'all' / f'{name}_seed_{i}' / 'metrics.jsonl').write_text((source / 'metrics.jsonl').read_text())
    report_main([str(tmp_path / 'all'), str(tmp_path / 'runs' / 'dense')], str(tmp_path / 'out'))
    with (tmp_path / 'out' / 'report.csv').open() as file:
        rows = [(row['seed'], row['branch']) for row in csv.DictReader(file)]
    branches = ('dense', 'dense continuation', 'upcycled')
    assert rows == [(seed, branch) for seed in '12' for branch in branches]


def test_console(runs):
    console = rich.console.Console(record=True, width=140)
    print_table([Report(runs)], console)
    text = console.export_text()
    assert '+2.4 PFLOPs (80.0% of the sunk cost)' in text
    assert re.search(r'upcycled +steps +700 +loss +-0\.1100', text)


def test_units():
    assert unit(Axis.FLOPS, 3e18) == (1e18, 'EFLOPs')
    assert unit(Axis.SECONDS, 0.5) == (1.0, 'seconds')
    assert unit(Axis.SECONDS, 7200.0) == (3600.0, 'hours')
    assert unit(Axis.STEPS, 1e9) == (1.0, 'steps')
