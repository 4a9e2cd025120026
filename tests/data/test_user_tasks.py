"""User seqio tasks that do not fit: any error of seqio or the task becomes one sentence that names the binding."""

import pytest
import seqio
import tensorflow as tf

from upcycle.data.text import DatasetConfig
from upcycle.errors import UserError

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)
BOTH = {name: seqio.Feature(VOCABULARY) for name in ('inputs', 'targets')}
TEXT = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
ROWS = {'inputs': ['ab', 'cd'], 'targets': ['e', 'f']}


def raises(dataset):
    raise KeyError('question')


def unlucky(dataset):
    return dataset.map(lambda row: {'inputs': row['nothing']})


class NoFiles(seqio.ByteVocabulary):
    @property
    def _base_vocab_size(self):
        raise ImportError('no module sentencepiece')


def add(name, rows=None, features=None, preprocessors=None):
    def data(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices(rows or ROWS)

    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(data, splits=('train',)),
        preprocessors=TEXT if preprocessors is None else preprocessors,
        output_features=features or BOTH,
    )


# Arguments of the task, bindings, words of the message.
CASES = {
    'is not cached': (
        {'preprocessors': [TEXT[0], seqio.CacheDatasetPlaceholder(), TEXT[1]]},
        {'use_cached': True},
        ['USE_CACHED_TASKS = True', 'does not exist'],
    ),
    'must be cached': (
        {'preprocessors': [TEXT[0], seqio.CacheDatasetPlaceholder(required=True), TEXT[1]]},
        {},
        ['USE_CACHED_TASKS = False', 'requires caching'],
    ),
    'no targets': ({'features': {'inputs': BOTH['inputs']}}, {}, ['inputs', 'not targets']),
    'other features': ({'features': {'question': BOTH['inputs']}}, {}, ['question', 'not inputs or targets']),
    'its preprocessor raises': ({'preprocessors': [raises]}, {}, ["KeyError: 'question'"]),
    'its preprocessor asks for another column': ({'preprocessors': [unlucky]}, {}, ['nothing']),
    'numbers that are no ids': ({'rows': {'inputs': [[1.5]], 'targets': [[2.5]]}, 'preprocessors': []}, {}, ['float']),
    'a vocabulary that does not load': (
        {'features': {name: seqio.Feature(NoFiles()) for name in BOTH}},
        {},
        ['no module sentencepiece'],
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_a_task_that_does_not_fit_is_one_sentence(case):
    registered, bound, words = CASES[case]
    add('user_task', **registered)
    config = DatasetConfig(
        **{
            'mixture_or_task_name': 'user_task',
            'task_feature_lengths': {'inputs': 8, 'targets': 8},
            'split': 'train',
            'batch_size': 2,
            **bound,
        }
    )
    with pytest.raises(UserError) as error:
        assert config.vocabulary_size > 0
        config.fingerprint()
        next(config.batches())
    message = str(error.value)
    assert message.startswith("MIXTURE_OR_TASK_NAME = 'user_task' ") and '\n' not in message, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('import nothing_of_that_name', 'No module named'),
        ('def', 'invalid syntax'),
        ('raise ValueError("no data folder")', 'no data folder'),
        ('1 / 0', 'ZeroDivisionError: division by zero'),
        ('raise SystemExit(3)', 'SystemExit: 3'),
    ],
)
def test_a_module_that_fails_is_one_sentence(text, words, tmp_path, monkeypatch):
    (tmp_path / 'user_module.py').write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = DatasetConfig('user_task', {'inputs': 8, 'targets': 8}, 'train', 2, module='user_module')
    with pytest.raises(UserError, match="MIXTURE_OR_TASK_MODULE = 'user_module' cannot be imported") as error:
        config.fingerprint()
    assert words in str(error.value)
