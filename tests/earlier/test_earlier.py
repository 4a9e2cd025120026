"""Run folders that earlier versions wrote: read, evaluated, resumed and exported as those versions did."""

import json
import pathlib
import tarfile

import pytest

from tests.earlier import kinds
from upcycle import configuration, run_config, transfer
from upcycle.checkpoints import open_checkpoint
from upcycle.evaluate.diversity import Diversity
from upcycle.evaluate.few_shot import FewShot
from upcycle.evaluate.tasks import TaskMetrics
from upcycle.evaluate.validation import Validation
from upcycle.training import loop

VERSIONS = sorted(path for path in pathlib.Path(__file__).parent.iterdir() if path.name[0].isdigit())
# With router state, and with few-shot probes; the others repeat what these go through.
OFTEN = ('t5_router_state', 'vit_upcycled')
KINDS = pytest.mark.parametrize('kind', kinds.KINDS)
# Formats, and what becomes of the optimizer state: T5X factors that of experts, which these sizes do not.
EXPORTS = {'t5_dense': ('t5x_orbax', 'keep'), 't5_upcycled': ('t5x_legacy', 'none'), 'vit_dense': ('vit_npz', 'none')}


@pytest.fixture(scope='module', params=VERSIONS, ids=lambda path: path.name)
def version(request):
    """The folder of a version's archives."""
    return request.param


@pytest.fixture(scope='module')
def folder(version, tmp_path_factory):
    """Where its run folders are."""
    path = tmp_path_factory.mktemp(version.name)
    for archive in version.glob('*.tar.gz'):
        with tarfile.open(archive) as files:
            files.extractall(path, filter='data')
    return path


def expected(version, kind):
    return json.loads((version / f'{kind}.json').read_text())


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    """Paths in the configurations are relative to the folder."""
    monkeypatch.chdir(folder)


@KINDS
def test_leaves(kind, version):
    reader = open_checkpoint(kind)
    assert reader.step == kinds.saved(kind)
    assert kinds.digests(reader) == expected(version, kind)['leaves']


@KINDS
def test_configurations(kind):
    """The same command is the same run, and so is the stored configuration."""
    run = configuration.load(kinds.KINDS[kind][1], kinds.bindings(kind, kind, kinds.saved(kind) + 2))
    run_config.claim(run, configuration.resolved(), write=False)
    stored = configuration.load([f'{kind}/config.gin'], {})
    assert stored.model == run.model and stored.optimizer == run.optimizer and stored.surgery == run.surgery


@pytest.mark.parametrize(
    'kind', [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in kinds.KINDS]
)
def test_evaluated_and_resumed(kind, version):
    found, before = kinds.told(kind), expected(version, kind)
    assert found['leaves'] == before['leaves']
    for split, metrics in before['evaluation'].items():
        assert_close(found['evaluation'][split], without_load_loss(kind, metrics), 1e-5)
    assert len(found['lines']) == len(before['lines']) > 0
    for line, other in zip(found['lines'], before['lines'], strict=True):
        if other['split'] != 'train':
            other = without_load_loss(kind, other)
        # Other compiler flags round otherwise, and Adafactor makes that larger, most of all where gradients are small.
        of_routers = {name for name in other if 'router' in name}
        assert_close(line, {name: value for name, value in other.items() if name not in of_routers}, 1e-3)
        assert_close(line, {name: other[name] for name in of_routers}, 0.03)


def without_load_loss(kind, metrics):
    """Until 2026-11 V-MoE's load loss counted at evaluation too, where no noise is added. One kind of run has GATE_NOISE."""
    if kind != 'vit_upcycled':
        return metrics
    return {name: value for name, value in metrics.items() if not name.endswith('auxiliary_loss')}


def assert_close(found, before, tolerance):
    """Every number of before is still there, and nearly the same. There may be more."""
    assert found.keys() >= before.keys()
    for name, value in before.items():
        if isinstance(value, dict):
            assert_close(found[name], value, tolerance)
        else:
            known = value if isinstance(value, str) else pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True)
            assert found[name] == known, name


@pytest.mark.parametrize('kind', EXPORTS)
def test_exported(kind, version, tmp_path):
    format, state = EXPORTS[kind]
    out = transfer.transfer(kind, str(tmp_path / 'out.npz'), format, optimizer_state=state)
    kept = ('params/', 'opt_state/', 'step') if state == 'keep' else ('params/',)
    before, found = (
        {name: leaf for name, leaf in leaves.items() if name.startswith(kept)}
        for leaves in (expected(version, kind)['leaves'], kinds.digests(open_checkpoint(out)))
    )
    assert found == before


def test_former_names_of_evaluators():
    """What a checkpoint says was due when its run was stopped."""
    names = {kind.name for kind in (Validation, FewShot, TaskMetrics, Diversity)}
    assert set(loop.FORMER_NAMES.values()) == names and not names & loop.FORMER_NAMES.keys()
