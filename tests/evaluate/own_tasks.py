"""Tasks in lm-eval's YAML with local data, for tests: choices, log-likelihoods, whole texts, generated answers."""

import json
import pathlib
import random
from collections.abc import Sequence

from tests.docs.pages import DOCS, fences

WORDS = ('Document', 'end.', 'and', 'the', 'rest,', 'é', 'x7', 'of', 'them')

_LAST_WORD = """\
task: own_last_word
dataset_path: json
dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1] | join(' ')}}}}"
doc_to_target: "{{{{' ' + text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
_ROLLING = """\
task: own_rolling
dataset_path: json
dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
_ANSWERS = """\
task: own_answers
dataset_path: json
dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/answers.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: 12, do_sample: false, temperature: 0.0}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
TASKS = ('own_choices', 'own_last_word', 'own_rolling', 'own_answers')


def texts(count: int, words: tuple[int, int], seed: int) -> list[str]:
    """Returns random texts; `words` are the fewest and the most words of each."""
    rng = random.Random(seed)
    return [' '.join(rng.choices(WORDS, k=rng.randint(*words))) for _ in range(count)]


DOCUMENTS = texts(10, (2, 60), 2)  # some are longer than the models of the tests read at once


def write(folder: pathlib.Path, answers: Sequence[str] = (), until: Sequence[str] = ('\n',)) -> list[str]:
    """Writes the tasks and their data.

    Args:
      folder: of both.
      answers: those of the first questions.
      until: ends an answer.

    Returns:
      The questions of the task of generated answers.
    """
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    choices = [
        {'question': question, 'choices': texts(4, (1, 4), seed), 'label': rng.randrange(4)}
        for seed, question in enumerate(texts(12, (1, 12), 1))
    ]
    questions = texts(9, (1, 10), 3)
    answered = [
        {'question': question, 'answer': answers[i] if i < len(answers) else 'none'}
        for i, question in enumerate(questions)
    ]
    documents = [{'text': text} for text in DOCUMENTS]
    for name, lines in (('choices', choices), ('texts', documents), ('answers', answered)):
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
    # The task of the page, with other paths.
    (own_choices,) = fences(DOCS / 'evaluation.md', 'yaml')
    data = f'{{cache_dir: {folder}/cache, data_files: {{test: {folder}/choices.jsonl}}}}'
    assert (in_page := '{data_files: {test: own_tasks/choices.jsonl}}') in own_choices
    (folder / 'choices.yaml').write_text(own_choices.replace(in_page, data), encoding='utf-8')
    for name, text in (('last_word', _LAST_WORD), ('rolling', _ROLLING), ('answers', _ANSWERS)):
        filled = text.format(folder=folder, until=json.dumps([*until]))
        (folder / f'{name}.yaml').write_text(filled, encoding='utf-8')
    return questions
