"""Every task file of `gin/tasks` builds its two data sources, and so does the saved configuration."""

import pathlib

import pytest
from PIL import Image

import gin
import upcycle
from upcycle.commands import tokenize
from upcycle.data import images
from upcycle.data.text import DatasetConfig
from upcycle.errors import UserError

ROOT = pathlib.Path(upcycle.__file__).parents[1]
if not (ROOT / 'gin' / 'tasks').is_dir():
    ROOT = pathlib.Path(upcycle.__file__).parent
TASKS = sorted((ROOT / 'gin' / 'tasks').glob('*_span_corruption.gin'))
# photographs.gin is not a task; others include it.
SYNTHETIC = sorted((ROOT / 'gin' / 'tasks').glob('synthetic_*.gin'))
OTHERS = [ROOT / 'gin' / 'tasks' / f'{name}.gin' for name in ('photographs', 'superglue', 'stdlib_keyword')]
CAUSAL = [ROOT / 'gin' / 'tasks' / f'{name}.gin' for name in ('stdlib_bytes', 'tokens')]
NO_IMAGE_TASKS = {*TASKS, *SYNTHETIC, *OTHERS, *CAUSAL}
IMAGE_TASKS = sorted({*(ROOT / 'gin' / 'tasks').glob('*.gin')} - NO_IMAGE_TASKS)
SCANS = ('mnist5k', 'optdigits')
gin.add_config_file_search_path(str(ROOT / 'gin'))

RUN = """
from __gin__ import dynamic_registration
from tests.data import test_gin_tasks
BATCH_SIZE = 4
EVAL_BATCH_SIZE = 8
EVAL_STEPS = 2
DATA_SEED = 3
test_gin_tasks.sources.train = %TRAIN_DATASET
test_gin_tasks.sources.evaluation = %EVAL_DATASET
"""


def sources(train, evaluation):
    return train, evaluation


def build(text, macro='TASK_FEATURE_LENGTHS'):
    gin.clear_config(clear_constants=True)
    gin.parse_config(text)
    built = gin.get_configurable(sources)()
    operative = gin.operative_config_str()
    value = gin.query_parameter(f'%{macro}')
    gin.clear_config(clear_constants=True)
    return built, operative, value


@pytest.mark.parametrize('path', TASKS, ids=lambda path: path.stem)
def test_a_task_file_builds_and_its_operative_config_too(path):
    files = f"TRAIN_FILES = '{ROOT}/upcycle/**/*.py'" if path.stem.startswith('text_files') else ''
    (train, evaluation), operative, lengths = build(f"include '{path}'\n{RUN}\n{files}")
    assert isinstance(train, DatasetConfig)
    assert (train.split, train.batch_size, train.seed, train.shuffle, train.repeat) == ('train', 4, 3, True, True)
    assert (evaluation.split, evaluation.batch_size, evaluation.num_batches) == ('validation', 8, 2)
    # A bounded evaluation of our tasks is a fixed sample of all held-out files, not the first few.
    assert (evaluation.shuffle, evaluation.seed) == (not path.stem.startswith('c4'), 42)
    assert (evaluation.repeat, evaluation.task_feature_lengths) == (False, lengths)
    assert build(operative)[0] == (train, evaluation)
    if path.stem.startswith('c4'):
        try:
            assert train.vocabulary_size == 32100
        except UserError as error:
            assert 'pip install upcycle[t5]' in str(error) or 'check the network' in str(error)
        return
    vocabulary_size = train.vocabulary_size
    assert f'NUM_EMBEDDINGS = {-(-vocabulary_size // 128) * 128}\n' in path.read_text()
    assert next(train.batches())['encoder_input_tokens'].shape == (4, lengths['inputs'])
    assert len(list(evaluation.batches())) <= 2


def test_the_task_of_keywords_builds_and_its_operative_config_too():
    path = ROOT / 'gin' / 'tasks' / 'stdlib_keyword.gin'
    (train, evaluation), operative, lengths = build(f"include '{path}'\n{RUN}")
    assert build(operative)[0] == (train, evaluation)
    batch = next(train.batches())
    assert batch['encoder_input_tokens'].shape == (4, lengths['inputs'])
    assert batch['decoder_target_tokens'].shape == (4, lengths['targets'])
    assert 0 < len(list(evaluation.batches())) <= 2


def test_files_must_be_bound():
    path = next(path for path in TASKS if path.stem.startswith('text_files'))
    (train, _), _, _ = build(f"include '{path}'\n{RUN}")
    with pytest.raises(UserError, match='TRAIN_FILES is not set'):
        train.batches()


@pytest.mark.parametrize('path', IMAGE_TASKS, ids=lambda path: path.stem)
def test_an_image_task_file_builds_and_its_operative_config_too(path, tmp_path):
    text = f"include '{path}'\n{RUN}"
    if path.stem == 'image_folder':
        text += f"\nTRAIN_FOLDER = '{image_folder(tmp_path)}'\nNUM_CLASSES = 2"
    elif path.stem not in SCANS:
        text += f"\nTFDS_DATA_DIR = '{tmp_path}'"
    (train, evaluation), operative, num_classes = build(text, 'NUM_CLASSES')
    _, _, size = build(text, 'IMAGE_SIZE')
    _, _, channels = build(text, 'IMAGE_CHANNELS')
    assert isinstance(train, images.DatasetConfig)
    assert (train.batch_size, train.seed, train.shuffle, train.repeat) == (4, 3, True, True)
    assert (evaluation.batch_size, evaluation.num_batches, evaluation.seed) == (8, 2, 42)
    assert not evaluation.repeat and train.split != evaluation.split
    assert train.image_shape == evaluation.image_shape == (size, size, channels)
    assert build(operative, 'BATCH_SIZE')[0] == (train, evaluation)
    if path.stem in (*SCANS, 'image_folder'):
        assert train.num_classes == evaluation.num_classes == num_classes
        assert next(train.batches())['image'].shape == (4, size, size, channels)
        assert 0 < len(list(evaluation.batches())) <= 2
    else:
        with pytest.raises(UserError, match=f'{path.stem}.* prepared in {tmp_path}'):
            train.batches()


@pytest.mark.parametrize('path', SYNTHETIC, ids=lambda path: path.stem)
def test_a_synthetic_task_file_builds_and_its_operative_config_too(path):
    text = f"include '{path}'\n{RUN}"
    if path.stem == 'synthetic_tokens':
        text += '\nNUM_EMBEDDINGS = 384'  # the model's
    (train, evaluation), operative, batch_size = build(text, 'BATCH_SIZE')
    assert (train.batch_size, train.seed, train.num_batches) == (batch_size, 3, None)
    assert (evaluation.batch_size, evaluation.num_batches, evaluation.seed) == (8, 2, 42)
    assert build(operative, 'BATCH_SIZE')[0] == (train, evaluation)


@pytest.mark.parametrize('path', CAUSAL, ids=lambda path: path.stem)
def test_a_causal_task_file_builds_and_its_operative_config_too(path, tmp_path):
    more = ''
    if path.stem == 'tokens':
        (tmp_path / 'a.txt').write_text('word ' * 2000 + '<sep>' + 'other ' * 400)
        tokenize.run([str(tmp_path / 'a.txt')], 'bytes', str(tmp_path / 'a'), separator='<sep>', workers=1)
        more = f"TOKENS_DIR = ['{tmp_path}/a', '{tmp_path}/a']\nTOKENS_MIXTURE = [1.0, 2.0]\nSEQUENCE_LENGTH = 128"
    (train, evaluation), operative, length = build(f"include '{path}'\n{RUN}\n{more}", 'SEQUENCE_LENGTH')
    assert build(operative, 'BATCH_SIZE')[0] == (train, evaluation)
    assert (train.split, train.batch_size, train.seed, train.shuffle, train.repeat) == ('train', 4, 3, True, True)
    assert (evaluation.split, evaluation.batch_size, evaluation.num_batches) == ('validation', 8, 2)
    assert (evaluation.shuffle, evaluation.seed, evaluation.repeat) == (True, 42, False)
    assert next(train.batches())['tokens'].shape == (4, length) and 0 < len(list(evaluation.batches())) <= 2


def image_folder(folder):
    for name in ('cat', 'dog'):
        (folder / name).mkdir()
        for i in range(30):
            Image.new('RGB', (30, 40)).save(folder / name / f'{i}.png')
    return folder
