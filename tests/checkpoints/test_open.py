import subprocess
import sys

import pytest

from upcycle.checkpoints import open_checkpoint
from upcycle.errors import UserError


def test_import_is_cheap():
    code = 'import sys, upcycle.checkpoints; assert not {"jax", "orbax", "tensorstore", "numpy"} & sys.modules.keys()'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match='missing does not exist: name a checkpoint'):
        open_checkpoint(tmp_path / 'missing')


@pytest.mark.parametrize('content', ['nothing', 'a file', 'an empty step', 'a step of another layout'])
def test_no_checkpoint(tmp_path, content):
    if content == 'a file':
        (tmp_path / 'notes.txt').write_text('')
    elif content == 'an empty step':
        (tmp_path / 'checkpoints' / '100').mkdir(parents=True)
    elif content == 'a step of another layout':
        (tmp_path / '100' / 'default').mkdir(parents=True)
    with pytest.raises(UserError, match='holds no checkpoint that we read: looked for .*state/_METADATA'):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match='holds no checkpoint'):
        open_checkpoint(next(tmp_path.iterdir(), tmp_path))


def test_interrupted_t5x_save(tmp_path):
    (tmp_path / 'checkpoint_100.tmp-1700000000').mkdir()
    with pytest.raises(UserError, match='only saves that were interrupted .*checkpoint_100.tmp-'):
        open_checkpoint(tmp_path)
