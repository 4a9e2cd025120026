"""Commands warn of texts longer than those that a model was made for, whether it is a folder or in our format."""

import json

import pytest

from tests.fixtures import fixtures_dir, requires_fixtures
from tests.test_cli import call
from upcycle import api
from upcycle.checkpoints import open_checkpoint
from upcycle.commands import evaluate
from upcycle.errors import UserError
from upcycle.lengths import longest
from upcycle.transfer import transfer

LLAMA = fixtures_dir() / 'llm' / 'llama'
MOST = 64  # max_position_embeddings of its config.json

pytestmark = requires_fixtures


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
    """The model in our format, without a config.json."""
    path = tmp_path_factory.mktemp('lengths') / 'ours'
    transfer(str(LLAMA), str(path), 'upcycle', optimizer_state='none')
    return path


def options_of(command, source, length, folder):
    data = ['--gin_file=models/from_checkpoint.gin', '--gin_file=tasks/synthetic_tokens.gin']
    small = [f'--gin.SEQUENCE_LENGTH={length}', '--gin.BATCH_SIZE=2', '--gin.EVAL_BATCH_SIZE=2', '--gin.EVAL_STEPS=1']
    start = [f'--gin.INITIAL_CHECKPOINT_PATH={source}', f'--gin.MODEL_DIR={folder}', '--gin.OPTIMIZER_STATE=fresh']
    return {
        'plan': [*data, '--gin_file=runs/continue_dense.gin', *small, *start, '--gin.TRAIN_STEPS=5'],
        'eval': [f'--from={source}', *data, '--gin_file=runs/eval.gin', *small],
        'generate': [f'--from={source}', '--tokenizer=bytes', '--prompt=ab', f'--max_new_tokens={length - 2}'],
    }[command]


@pytest.mark.parametrize('length', [MOST, MOST + 1])
@pytest.mark.parametrize('command', ['plan', 'eval', 'generate'])
def test_longer_texts_are_warned_of(command, length, ours, tmp_path, capsys, monkeypatch):
    def load(*arguments, **options):
        raise UserError('the warnings are printed')

    monkeypatch.setattr(evaluate, 'params_of', load)
    monkeypatch.setattr(api, 'load', load)
    code, _, error = call([command, *options_of(command, ours, length, tmp_path / 'run')], capsys)
    assert code == 0 if command == 'plan' else 'the warnings are printed' in error, error
    assert (f'made for {MOST} (max_position_embeddings)' in error) == (length > MOST), error


def test_a_folder_and_a_step_of_ours_tell_the_length(ours):
    assert json.loads((LLAMA / 'config.json').read_text())['max_position_embeddings'] == MOST
    assert longest(open_checkpoint(LLAMA)) == longest(open_checkpoint(ours)) == MOST
    assert longest(open_checkpoint(fixtures_dir() / 't5x_dense_legacy')) is None
