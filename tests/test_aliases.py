"""Names of earlier versions in gin files."""

from tests import runs
from upcycle import aliases, configuration

FORMER = """
from __gin__ import dynamic_registration

from upcycle.train import run
from upcycle.train import schedule as rates
import upcycle.train.health

run.Run.checkpoint_keep = 7
rates.LearningRate.timescale = 11
upcycle.train.health.Limits.max_skipped_steps = 3
OPTIMIZER = @upcycle.train.optimizer.Adafactor()
import upcycle.train.optimizer
"""


def test_names():
    assert aliases.current('a/b/upcycle.train.run.Run.seed') == 'a/b/upcycle.training.run.Run.seed'
    for name in ('upcycle.training.run', 'upcycle.trainer', 'train.run', 'upcycle', 'other.upcycle.train'):
        assert aliases.current(name) == name
    assert aliases.current_value("(@x/upcycle.train.run.Run(), 'upcycle.train')") == (
        "(@x/upcycle.training.run.Run(), 'upcycle.train')"
    )


def test_a_users_file_with_former_names(tmp_path):
    (tmp_path / 'mine.gin').write_text(FORMER)
    files = (*runs.FILES['dense'], str(tmp_path / 'mine.gin'))
    more = {'upcycle.train.run.Run.dense_flops': '2.0', 'upcycle.train.run.Run.seed': '5'}
    run = configuration.load(files, runs.bindings('dense', '/nowhere', 6) | more)
    assert (run.checkpoint_keep, run.learning_rate.timescale, run.limits.max_skipped_steps) == (7, 11, 3)
    assert (run.dense_flops, run.seed) == (2.0, 5)
    assert not [name for name in configuration.resolved() if name.startswith('upcycle.train.')]
