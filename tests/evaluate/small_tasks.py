"""Two tasks over files in SuperGLUE's format, with T5's texts, and a mixture of them.

`write` makes the files in `FOLDER`.
"""

import json
import os
import tempfile

import numpy as np
import seqio
import tensorflow as tf

FOLDER = tempfile.mkdtemp()
VOCABULARY = seqio.ByteVocabulary()
# Arguments of the metrics, newest last.
ANSWERS: list[tuple[list[str], list[str]]] = []
SCORES: list[tuple[list[str], np.ndarray]] = []


def write(folder: str = FOLDER) -> None:
    """Writes `boolq` and `copa` as lines of JSON, as in the archives of super.gluebenchmark.com."""
    boolq = [
        {
            'question': f'is {n} even',
            'passage': ('odd' if n % 2 else 'even') * 10,
            'idx': n,
            'label': n % 2 == 0,
        }
        for n in range(6)
    ]
    copa = [
        {
            'premise': f'It rained {n} days.',
            'choice1': 'wet',
            'choice2': 'dry',
            'question': 'effect',
            'idx': n,
            'label': n % 2,
        }
        for n in range(3)
    ]
    for name, rows in {'boolq': boolq, 'copa': copa}.items():
        for split in ('train', 'val'):
            with open(os.path.join(folder, f'{name}_{split}.jsonl'), 'w', encoding='utf-8') as file:
                file.writelines(json.dumps(row) + '\n' for row in rows)


def _source(name: str, text_of):
    def examples(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        part = 'val' if split == 'validation' else split
        with open(os.path.join(FOLDER, f'{name}_{part}.jsonl'), encoding='utf-8') as file:
            texts = [text_of(json.loads(line)) for line in file]
        return tf.data.Dataset.from_tensor_slices({key: [text[key] for text in texts] for key in texts[0]})

    return seqio.FunctionDataSource(examples, splits=('train', 'validation'))


def _boolq(row):
    inputs = f'boolq question: {row["question"]} passage: {row["passage"]}'
    return {'inputs': inputs, 'targets': str(row['label'])}


def _copa(row):
    inputs = f'copa premise: {row["premise"]} 1: {row["choice1"]} 2: {row["choice2"]}'
    return {'inputs': inputs, 'targets': row[f'choice{row["label"] + 1}']}


def accuracy(targets, predictions):
    """Accuracy in percent, as in t5."""
    ANSWERS.append((list(targets), list(predictions)))
    return {'accuracy': 100.0 * np.mean([a == b for a, b in zip(targets, predictions, strict=True)])}


def likelihood(targets, scores):
    """Likelihood of the correct answer."""
    SCORES.append((list(targets), np.asarray(scores)))
    return {'log_likelihood': float(np.mean(scores)), 'answers': len(scores)}


def _add(name: str, text_of, metrics) -> None:
    seqio.TaskRegistry.add(
        f'small_{name}',
        source=_source(name, text_of),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={key: seqio.Feature(vocabulary=VOCABULARY, add_eos=True) for key in ('inputs', 'targets')},
        metric_fns=metrics,
    )


write()
_add('boolq', _boolq, [accuracy])
_add('copa', _copa, [likelihood])
_add('unmeasured', _boolq, [])
seqio.MixtureRegistry.add('small_glue', [('small_boolq', 6), ('small_copa', 3), ('small_unmeasured', 1)])
