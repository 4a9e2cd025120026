"""Tasks on text that needs no download, the source code of the running Python's standard library.

Importing this module registers the seqio tasks `stdlib_span_corruption` (pretraining) and `stdlib_keyword` (fine-tuning). Files
are read at first use. Each Python version is a different corpus with a different fingerprint.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from upcycle.data import corpus, random_access, tensorflow_quiet
from upcycle.data.stdlib_source import stdlib_documents

if TYPE_CHECKING:
    import tensorflow as tf

seqio = tensorflow_quiet.seqio()

_VOCABULARY = seqio.ByteVocabulary(extra_ids=100)

STDLIB_TASK = random_access.span_corruption_task(
    'stdlib_span_corruption', lambda: corpus.build_corpus(stdlib_documents(), _VOCABULARY), _VOCABULARY
)
seqio.TaskRegistry.add_provider(STDLIB_TASK.name, STDLIB_TASK)

# All are frequent, and their context mostly tells them apart.
KEYWORDS = ('and', 'def', 'else', 'for', 'if', 'import', 'in', 'is', 'not', 'return')
GAP = '____'
_CONTEXT = 29  # bytes on either side of the gap
_EXAMPLES_PER_KEYWORD = {'train': 2000, 'validation': 200}


@functools.cache
def keyword_examples() -> Mapping[str, Sequence[Mapping[str, bytes]]]:
    """Examples by split: `inputs` is source code with a gap, `targets` the missing keyword. Keywords are balanced.

    The splits are those of `stdlib_span_corruption`, so pretraining never reads the validation files.
    """
    places: dict[tuple[str, str], list[tuple[bytes, int, int]]] = collections.defaultdict(list)
    pattern = re.compile(rb'(?<![\w.])(' + '|'.join(KEYWORDS).encode() + rb')(?!\w)')
    for document in sorted(stdlib_documents()):
        for match in pattern.finditer(document.content):
            places[document.split, match[0].decode()].append((document.content, *match.span()))

    def example(split: str, keyword: str, share: float) -> dict[str, bytes]:
        matches = places[split, keyword]
        content, start, end = matches[int(len(matches) * share)]
        around = content[max(start - _CONTEXT, 0) : start], content[end : end + _CONTEXT]
        return {'inputs': GAP.encode().join(around), 'targets': keyword.encode()}

    return {
        split: [example(split, keyword, i / count) for i in range(count) for keyword in KEYWORDS]
        for split, count in _EXAMPLES_PER_KEYWORD.items()
    }


def _keyword_dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    examples = keyword_examples()[split]
    columns = {name: [example[name] for example in examples] for name in ('inputs', 'targets')}
    return tensorflow_quiet.tensorflow().data.Dataset.from_tensor_slices(columns)


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Fraction of predictions that equal their target."""
    return {'accuracy': sum(a == b for a, b in zip(targets, predictions, strict=True)) / len(targets)}


KEYWORD_TASK = seqio.Task(
    'stdlib_keyword',
    source=seqio.FunctionDataSource(
        _keyword_dataset,
        splits=tuple(_EXAMPLES_PER_KEYWORD),
        num_input_examples={split: count * len(KEYWORDS) for split, count in _EXAMPLES_PER_KEYWORD.items()},
    ),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={
        'inputs': seqio.Feature(_VOCABULARY),
        'targets': seqio.Feature(_VOCABULARY),
    },
    metric_fns=[exact_match],
)
seqio.TaskRegistry.add_provider(KEYWORD_TASK.name, KEYWORD_TASK)
