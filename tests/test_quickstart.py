"""The quickstart with a few steps: four runs, a table, a report, and resumption."""

import dataclasses
import re

import pytest

from upcycle import quickstart as quick
from upcycle.errors import UserError
from upcycle.metrics import read_metrics


@pytest.mark.parametrize('family', quick.JOBS)
def test_equal_flops_and_the_same_batches(family):
    dense, continuation, upcycled, scratch = quick.branches(quick.JOBS[family], '/nowhere', 1.0, seed=3)
    steps = {branch.name: int(branch.bindings['TRAIN_STEPS']) for branch in (dense, continuation, upcycled, scratch)}
    cost = {branch.name: quick.flops_of(branch.gin_files, branch.bindings) for branch in (dense, scratch)}
    extra = (steps['upcycled'] - steps['dense']) * cost['scratch']
    assert (steps['dense_continuation'] - steps['dense']) * cost['dense'] == pytest.approx(extra, rel=0.01)
    assert steps['scratch'] * cost['scratch'] == pytest.approx(steps['dense'] * cost['dense'] + extra, rel=0.01)
    assert {branch.bindings['DATA_SEED'] for branch in (dense, continuation, upcycled, scratch)} == {'3'}


ONE_LAYER = {
    'language': (
        *(f'NUM_{stack}_LAYERS = 1' for stack in ('ENCODER', 'DECODER')),
        *(f'{stack}_MOE_LAYERS = (0,)' for stack in ('ENCODER', 'DECODER')),
    ),
    'vision': ('NUM_LAYERS = 1', "MOE_LAYERS = 'last_1'"),
    'llm': ('NUM_LAYERS = 1', 'SEQUENCE_LENGTH = 32', 'EVAL_BATCH_SIZE = 4'),
}
REPEATED = [pytest.param(family, marks=pytest.mark.exhaustive) for family in ('vision', 'llm')]


@pytest.mark.parametrize('family', ['language', *REPEATED])
def test_quickstart_runs_resumes_and_reports(family, tmp_path, capsys, monkeypatch):
    out, small, job = tmp_path / 'out', tmp_path / 'small.gin', quick.JOBS[family]
    bindings = ['EVAL_STEPS = 1', 'NUM_EXPERTS = 4', 'STEP_0_CAPACITY_FACTORS = (2.0,)', *ONE_LAYER[family]]
    small.write_text('\n'.join([f"include '{job.settings}'", *bindings, '']))
    monkeypatch.setitem(quick.JOBS, family, dataclasses.replace(job, settings=str(small)))
    page = quick.quickstart(str(out), family=family, budget=0.002)
    printed, html = capsys.readouterr().out, page.read_text()
    assert 'validation loss' in printed
    if job.prompt:
        assert printed.count(f'continues {job.prompt!r}') == 4 and html.count(job.prompt) == 4
        assert 'largest difference of logits 0.0e+00' in printed and (out / f'upcycled_{job.export}').is_dir()
    pictures = set(re.findall(r'<img [^>]*src="([^"]*)"', html))
    assert len(pictures) > 8 and all((page.parent / name).is_file() for name in pictures)
    assert 'upcycle train' in html
    for branch in ('dense', 'dense_continuation', 'upcycled', 'scratch'):
        assert read_metrics(str(out / 'seed_0' / branch / 'metrics.jsonl'))[-1]['split'] == 'validation'
    monkeypatch.setattr(quick.train, 'run', None)  # nothing is left to train
    assert quick.quickstart(str(out), family=family, budget=0.002) == page
    with pytest.raises(UserError, match='--budget'):
        quick.quickstart(str(out), family=family, budget=0.003)


@pytest.mark.parametrize(('budget', 'seeds'), [(0, (0,)), (-1, (0,)), (1, ()), (1, (1, 1))])
def test_refusals(tmp_path, budget, seeds):
    with pytest.raises(UserError):
        quick.quickstart(str(tmp_path / 'out'), budget=budget, seeds=seeds)
    assert not (tmp_path / 'out').exists()
