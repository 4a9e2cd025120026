"""The embedded fine-tuning task: balanced keywords, from files of the right split, without the answer in the input."""

import collections
import re

import pytest

from upcycle.data import embedded, tensorflow_quiet

seqio = tensorflow_quiet.seqio()


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_every_keyword_is_asked_for_as_often(split):
    examples = embedded.keyword_examples()[split]
    counts = collections.Counter(example['targets'].decode() for example in examples)
    assert set(counts) == set(embedded.KEYWORDS) and len(set(counts.values())) == 1
    assert len(examples) == embedded.KEYWORD_TASK.num_input_examples(split)


def test_an_answer_fits_its_gap_in_a_file_of_the_split():
    text = collections.defaultdict(bytes)
    for document in embedded.stdlib_documents():
        text[document.split] += document.content + b'\0' * 64
    for split, examples in embedded.keyword_examples().items():
        for example in examples[:: len(examples) // 50]:
            before, after = re.fullmatch(rb'(.*?)____(.*)', example['inputs'], re.DOTALL).groups()
            assert before + example['targets'] + after in text[split]


def test_rows_end_in_eos_and_fit():
    dataset = embedded.KEYWORD_TASK.get_dataset({'inputs': 64, 'targets': 8}, 'validation', shuffle=False)
    vocabulary = embedded.KEYWORD_TASK.output_features['targets'].vocabulary
    rows = list(dataset.take(10).as_numpy_iterator())
    assert [vocabulary.decode(row['targets'].tolist()) for row in rows] == list(embedded.KEYWORDS)
    assert all(row[name][-1] == vocabulary.eos_id for row in rows for name in ('inputs', 'targets'))
    every = embedded.keyword_examples().values()
    assert max(len(example['inputs']) for examples in every for example in examples) < 64
    assert max(map(len, embedded.KEYWORDS)) < 8


def test_an_answer_counts_where_it_is_the_target():
    assert embedded.exact_match(['if', 'for', 'in', 'is'], ['if', 'for', 'in ', '']) == {'accuracy': 0.5}
