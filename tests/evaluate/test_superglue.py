"""SuperGLUE as defined by the t5 package, on small data sets as prepared by TFDS, compared with t5's metric code.

Skipped if t5 is not installed (`pip install upcycle[t5]`).
"""

import functools
import io

import jax
import numpy as np
import pytest

from tests import runs
from upcycle import configuration, partitioning
from upcycle.commands import train
from upcycle.evaluate import tasks
from upcycle.metrics import read_metrics

pytest.importorskip('t5', reason='t5 is not installed (pip install upcycle[t5])')

MIXTURE = 'super_glue_v102_proportional'
LENGTHS = {'inputs': 128, 'targets': 16}
# t5's metrics of each task, whose means give the paper's score.
MEASURED = {
    'boolq_v102': {'accuracy'},
    'cb_v102': {'mean_3class_f1', 'accuracy'},
    'copa_v102': {'accuracy'},
    'multirc_v102': {'f1', 'exact_match'},
    'record_v102': {'f1', 'em'},
    'rte_v102': {'accuracy'},
    'wic_v102': {'accuracy'},
    'wsc_v102_simple_eval': {'accuracy'},
}
TEXT = 'the rain fell on a river and its people saw that some of them had not been there before he said so'


def sentence(n, length=6):
    words = TEXT.split()
    return ' '.join(words[(n * 7 + i * 3) % len(words)] for i in range(length))


def example(config, n):
    """Returns a row with the data set's fields and types."""
    label = n % 2
    pronoun = f'{sentence(n)} because he said so'
    return {
        'axb': {'sentence1': sentence(n), 'sentence2': sentence(n + 1), 'idx': n, 'label': label},
        'axg': {'premise': sentence(n), 'hypothesis': sentence(n + 1), 'idx': n, 'label': label},
        'boolq': {'question': sentence(n), 'passage': sentence(n + 1, 12), 'idx': n, 'label': label},
        'cb': {'premise': sentence(n), 'hypothesis': sentence(n + 1), 'idx': n, 'label': n % 3},
        'copa': {
            'premise': sentence(n),
            'choice1': sentence(n + 1),
            'choice2': sentence(n + 2),
            'question': 'effect' if label else 'cause',
            'idx': n,
            'label': label,
        },
        # Three answers per question.
        'multirc': {
            'paragraph': sentence(n // 3, 12),
            'question': sentence(n // 3),
            'answer': sentence(n),
            'idx': {'paragraph': n // 6, 'question': n // 3, 'answer': n},
            'label': label,
        },
        'record': {
            'passage': f'{sentence(n)} Anna {sentence(n + 1)} Ben',
            'query': f'{sentence(n)} @placeholder',
            'entities': ['Anna', 'Ben'],
            'answers': ['Anna'] if label else ['Ben', 'Anna'],
            'idx': {'passage': n, 'query': n},
        },
        'rte': {'premise': sentence(n), 'hypothesis': sentence(n + 1), 'idx': n, 'label': label},
        'wic': {
            'word': 'rain',
            'sentence1': 'the rain fell',
            'sentence2': f'some rain {sentence(n)}',
            'start1': 4,
            'end1': 8,
            'start2': 5,
            'end2': 9,
            'idx': n,
            'label': label,
        },
        'wsc.fixed': {
            'text': pronoun,
            'span1_index': 0,
            'span1_text': pronoun.split()[0],
            'span2_index': pronoun.split().index('because') + 1,
            'span2_text': 'he',
            'idx': n,
            'label': label,
        },
        'dpr': {
            'sentence': 'Anna saw Ben because he fell.',
            'pronoun': 'he',
            'candidates': ['Anna', 'Ben'],
            'label': label,
        },
    }[config]


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """Writes all of SuperGLUE, twelve rows per split, and a vocabulary trained on them; t5's own is in a bucket."""
    import sentencepiece
    import seqio
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp('tfds')
    texts = []
    configs = ('axb', 'axg', 'boolq', 'cb', 'copa', 'multirc', 'record', 'rte', 'wic', 'wsc.fixed', 'dpr')
    for config in configs:
        name = 'definite_pronoun_resolution:1.1.0' if config == 'dpr' else f'super_glue/{config}:1.0.2'
        builder = tfds.builder(name, data_dir=folder)
        splits = ('test',) if config in ('axb', 'axg') else ('train', 'validation', 'test')
        splits = tuple(split for split in splits if config != 'dpr' or split != 'validation')
        rows = [example(config, n) for n in range(12)]
        tfds.dataset_builders.store_as_tfds_dataset(
            name=builder.name,
            config=None if config == 'dpr' else builder.builder_config.name,
            version=str(builder.version),
            features=builder.info.features,
            split_datasets={split: list(enumerate(rows)) for split in splits},
            data_dir=folder,
        )
        texts += [str(value) for row in rows for value in row.values()]
    texts.append(
        'boolq cb copa multirc record rte wic wsc question passage premise hypothesis choice entailment True False'
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (folder / 'pieces.model').write_bytes(model.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TFDS_DATA_DIR', str(folder))
        patch.setattr(seqio.utils, '_TFDS_DATA_DIR_OVERRIDE', str(folder))
        import t5.data.mixtures  # noqa: F401

        for task in seqio.get_subtasks(seqio.get_mixture_or_task(MIXTURE)):
            for feature in task.output_features.values():
                patch.setattr(feature.vocabulary, '_sentencepiece_model_file', str(folder / 'pieces.model'))
        yield folder


def bindings(model_dir='unused', **more):
    small = {
        **runs.SMALL_STEPS,
        'NUM_EMBEDDINGS': '384',
        'TASK_FEATURE_LENGTHS': str(LENGTHS),
        'EVAL_BATCH_SIZE': '4',
        'MODEL_DIR': str(model_dir),
        'TRAIN_STEPS': '2',
        'NUM_EXPERTS': '4',
    }
    return small | {name: str(value) for name, value in more.items()}


FILES = (runs.TINY, 'moe/t5.gin', 'tasks/superglue.gin', 'runs/scratch.gin', 'runs/task_metrics.gin')


def half_right(params, batch, *, wrong):
    """Returns the correct answer if the inputs add up to an even number."""
    right = (batch['encoder_input_tokens'].sum(axis=-1) % 2 == 0)[:, None]
    return jax.numpy.where(right, batch['decoder_target_tokens'], wrong)


def test_the_scores_are_what_t5s_own_metrics_say(prepared, monkeypatch):
    import seqio
    from t5.evaluation import metrics

    run = configuration.load(FILES, bindings())
    vocabulary = seqio.get_mixture_or_task(MIXTURE).output_features['targets'].vocabulary
    wrong = np.pad(vocabulary.encode('False'), (0, LENGTHS['targets']))[: LENGTHS['targets']]
    monkeypatch.setattr(
        tasks, 'predict', lambda params, batch, *, model, spec, length: half_right(params, batch, wrong=wrong)
    )
    mesh = partitioning.make_mesh((1, 1, 1), 4, jax.devices()[:1])
    with partitioning.use(mesh):
        evaluator = tasks.TaskEvaluator(run.task_metrics, run.model, run.eval_data, partitioning.batch_sharding(mesh))
        found = evaluator.evaluate({})
    expected = {}
    for name in MEASURED:
        task = seqio.TaskRegistry.get(f'super_glue_{name}')
        targets, answers = [], []
        for row in task.get_dataset(LENGTHS, 'validation', shuffle=False).as_numpy_iterator():
            even = int(row['inputs'].sum()) % 2 == 0
            said = vocabulary.decode((row['targets'] if even else wrong).tolist())
            targets.append(task.postprocess_fn(row['targets_pretokenized'].decode(), example=row, is_target=True))
            answers.append(task.postprocess_fn(said, example=row, is_target=False))
        by_hand = {
            'cb_v102': [metrics.mean_multiclass_f1(num_classes=3), metrics.accuracy],
            'multirc_v102': [
                metrics.multirc_f1_over_all_answers,
                metrics.mean_group_metric(metrics.all_match),
            ],
            'record_v102': [metrics.deduplicate_metric(functools.partial(metrics.squad))],
        }.get(name, [metrics.accuracy])
        for metric in by_hand:
            expected |= {f'super_glue_{name}/{key}': value for key, value in metric(targets, answers).items()}
    names = {f'super_glue_{name}/{metric}' for name, metrics in MEASURED.items() for metric in metrics}
    assert found.keys() == names | {'average'} and expected.keys() == names
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert {round(value) for value in found.values()} - {0, 100}
    by_task = [np.mean([v for k, v in expected.items() if k.startswith(f'super_glue_{name}/')]) for name in MEASURED]
    assert found['average'] == pytest.approx(np.mean(by_task))


def test_a_sparse_model_is_trained_on_the_mixture_and_measured_on_all_of_it(prepared, tmp_path):
    train.run(FILES, bindings(tmp_path / 'run'))
    (line,) = [line for line in read_metrics(tmp_path / 'run' / 'metrics.jsonl') if line['split'] == 'tasks']
    measured = {f'super_glue_{name}/{metric}' for name, metrics in MEASURED.items() for metric in metrics}
    assert measured | {'average'} <= line.keys()
    assert all(np.isfinite(line[name]) for name in measured)
