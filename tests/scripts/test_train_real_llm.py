"""scripts/train_real_llm.py: the schedule, interruptions, what is written, and conversations through a model's template."""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np
import pytest
import scipy.special

import upcycle
from tests import runs, tokens
from tests.scripts.load import script
from tests.test_cli import call
from upcycle.api import convert
from upcycle.commands import tokenize, train
from upcycle.data.causal.tokenizers import chat_template_of, open_tokenizer
from upcycle.data.corpus import Document
from upcycle.metrics import read_metrics
from upcycle.transfer import transfer

train_real_llm = script('train_real_llm')
from smollm2 import conversations, picture, results, schedule, texts  # noqa: E402  found by the script

SIZES = schedule.Sizes(rates=(1e-4, 3e-4), rate_seeds=(0, 1), seeds=(3, 4))
RATIO = 1.5
SOURCE = '''
class Reader:
    """Reads lines of a file, and returns them one after the other."""

    def close(self):
        """Closes the file.

        {}
        """

    def _private(self):
        """Nobody asks about this method, since its name is private."""


async def fetch(url):
    """Short."""


def load(path):
    """Loads a file
    of two lines of text or more."""

    def inner():
        """Nobody asks about this function, which is in another."""
'''


def row(part, branch, rate, seed, **more):
    values = {'part': part, 'branch': branch, 'peak rate': rate, 'seed': str(seed), 'steps': '2', 'data': 'x', **more}
    return {name: values.get(name, '') for name in results.COLUMNS}


def test_conversations_are_questions_about_what_is_public():
    documents = [
        Document('json/decoder.py', 'train', SOURCE.format('long ' * 400).encode()),
        Document('json/__init__.py', 'validation', SOURCE.format('And frees its memory, too.').encode()),
        Document('_json.py', 'train', SOURCE.encode()),
        Document('broken.py', 'train', b'def f(:'),
    ]
    made = conversations.conversations(documents, {'train': 2, 'validation': 3})
    assert made == conversations.conversations(documents[::-1], {'train': 2, 'validation': 3})
    answers = {
        message['messages'][0]['content'].split('`')[1]: message['messages'][1]['content']
        for message in made['train'] + made['validation']
    }
    assert answers == {
        'json.decoder.Reader': 'Reads lines of a file, and returns them one after the other.',
        'json.decoder.load': 'Loads a file\nof two lines of text or more.',
        'json.Reader': 'Reads lines of a file, and returns them one after the other.',
        'json.Reader.close': 'Closes the file.\n\nAnd frees its memory, too.',
        'json.load': 'Loads a file\nof two lines of text or more.',
    }
    with pytest.raises(conversations.CheckError, match='has 2 docstrings for train, fewer than 3: use 3.11'):
        conversations.conversations(documents, {'train': 3, 'validation': 3})


@pytest.mark.exhaustive
def test_the_standard_library_has_enough_docstrings_and_no_file_is_in_both_splits():
    made = conversations.conversations(texts.stdlib_documents())
    assert {split: len(chats) for split, chats in made.items()} == conversations.EXAMPLES
    modules = {
        split: {chat['messages'][0]['content'].split('`')[1].split('.')[0] for chat in chats}
        for split, chats in made.items()
    }
    splits = {conversations.module_of(each.name): each.split for each in texts.stdlib_documents()}
    for split, chats in made.items():
        for chat in chats:
            name = chat['messages'][0]['content'].split('`')[1]
            module = next(name.rsplit('.', n)[0] for n in range(1, 9) if name.rsplit('.', n)[0] in splits)
            assert splits[module] == split
    assert modules['train'] and modules['validation']


def test_verses_become_chapters():
    verses = [{'book': 'Ruth', 'chapter': 1, 'text': 'a'}, {'book': 'Ruth', 'chapter': 1, 'text': 'b'}]
    verses += [{'book': 'Ruth', 'chapter': 2, 'text': 'c'}, {'book': 'Job', 'chapter': 1, 'text': 'd'}]
    assert [chapter['text'] for chapter in texts.chapters(verses)] == ['a\nb', 'c', 'd']


def test_the_best_rate_of_each_branch_is_used_once_all_are_known():
    rows = []
    for seed, losses in ((0, (2.0, 2.3)), (1, (2.2, 2.1))):
        for rate, loss in zip(('0.0001', '0.0003'), losses, strict=True):
            assert schedule.best_rate(SIZES, rows, 'dense') is None
            rows.append(row('rates', 'dense', rate, seed, loss=str(loss)))
            rows.append(row('rates', 'upcycled', rate, seed, loss=str(-loss)))
    rows.append(row('rates', 'dense', '0.0009', 0, loss='0.1'))  # of another schedule
    assert (schedule.best_rate(SIZES, rows, 'dense'), schedule.best_rate(SIZES, rows, 'upcycled')) == (1e-4, 3e-4)
    continued = [run for run in schedule.runs(SIZES, rows, RATIO) if run.part == 'continued']
    assert [(run.branch, run.rate, run.seed, run.steps) for run in continued] == [
        ('dense', 1e-4, 3, 450),
        ('upcycled', 3e-4, 3, 300),
        ('dense', 1e-4, 4, 450),
        ('upcycled', 3e-4, 4, 300),
    ]


def test_branches_differ_in_experts_and_surgery_only():
    data = texts.Texts(*(pathlib.Path(name) for name in texts.NAMES))
    dense, upcycled = (
        set(schedule.Run('continued', branch, 1e-4, 3, 300).arguments(SIZES, data, 'model', 'run'))
        for branch in schedule.BRANCHES
    )
    assert dense - upcycled == {'--gin_file=runs/continue_dense.gin'}
    assert upcycled - dense == {
        '--gin_file=moe/llm.gin',
        '--gin_file=runs/upcycle.gin',
        '--gin.NUM_EXPERTS=4',
        '--gin.UPCYCLE_SEED=3',
    }


class Trainer:
    """Stands for `Programs`: writes what `upcycle` would, and is stopped after some commands."""

    def __init__(self, stop=None):
        self.commands, self._stop = [], stop

    def run(self, arguments):
        if len(self.commands) == self._stop:
            raise SystemExit(75)
        self.commands.append(arguments)
        options = {word.partition('=')[0]: word.partition('=')[2] for word in arguments}
        if arguments[0] == 'train':
            folder, steps = pathlib.Path(options['--gin.MODEL_DIR']), int(options['--gin.TRAIN_STEPS'])
            (folder / 'checkpoints' / str(steps)).mkdir(parents=True, exist_ok=True)
            loss = 2 + float(options['--gin.BASE_LEARNING_RATE'])
            lines = [{'step': 0, 'split': 'validation', 'loss': 3.0, 'flops': 0.0}]
            lines.append({'step': steps, 'split': 'train', 'loss': 2.5, 'flops': 3e12, 'seconds': 60.0})
            lines.append({'step': steps, 'split': 'validation', 'loss': loss, 'flops': 3e12})
            (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        elif arguments[0] == 'eval':
            pathlib.Path(options['--out']).write_text(json.dumps({'metrics': {'validation': {'loss': 1.25}}}))
        else:
            pathlib.Path(options['--to']).mkdir(exist_ok=True)
            (pathlib.Path(options['--to']) / 'model.safetensors').write_bytes(b'')
        return 1.5


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Makes sweeps on the same folders, whose `upcycle` commands are not run."""

    def prepare(out, model, examples):
        for name in texts.NAMES:
            (out / name).mkdir(parents=True, exist_ok=True)
            (out / name / 'index.json').write_text(json.dumps({'splits': [{'sha256': name}]}))
        return texts.Texts(*(out / name for name in texts.NAMES))

    flops = {'dense': 2.0, 'upcycled': 2.0 * RATIO}
    monkeypatch.setattr(texts, 'prepare', prepare)
    monkeypatch.setattr(train_real_llm, '_commit', lambda: 'abc')
    monkeypatch.setattr(train_real_llm.Sweep, '_step_flops', lambda self, branch: flops[branch])
    return lambda trainer: train_real_llm.Sweep(tmp_path / 'dense', tmp_path, tmp_path / 'results', SIZES, trainer)


def test_an_interrupted_sweep_continues_where_it_was(sweep, tmp_path):
    whole = Trainer()
    sweep(whole).conduct()
    rows = results.read(tmp_path / 'results' / 'runs.csv')
    assert [r['part'] for r in rows] == ['start', *['chat'] * 2, *['rates'] * 8, *['continued'] * 4]
    assert len({results.key_of(r) for r in rows}) == len(rows)
    assert all(r['bible loss'] == '1.25000' for r in rows if r['part'] in ('start', 'continued'))
    exports = [command for command in whole.commands if command[0] == 'export']
    assert [command[2].rpartition('/')[2] for command in exports] == [
        'chat_dense', 'chat_upcycled', 'continued_dense', 'continued_upcycled',
    ]  # fmt: skip
    assert not list(tmp_path.glob('*/checkpoints/*')) and not list(tmp_path.glob('*/*.new'))
    before = (tmp_path / 'results' / 'runs.csv').read_bytes()
    again = Trainer()
    sweep(again).conduct()
    assert not again.commands and (tmp_path / 'results' / 'runs.csv').read_bytes() == before


def test_every_stop_loses_at_most_the_command_that_ran(sweep, tmp_path):
    stops = 0
    while True:
        try:
            sweep(Trainer(stop=3)).conduct()
            break
        except SystemExit:
            stops += 1
    rows = results.read(tmp_path / 'results' / 'runs.csv')
    assert stops > 5 and len(rows) == 15 and [r['part'] for r in rows].count('continued') == 4
    assert len({results.key_of(r) for r in rows}) == 15
    assert len(results.read(tmp_path / 'results' / 'curves.csv')) == 3 * 14
    assert not list(tmp_path.glob('*/checkpoints/*'))


def test_rows_of_other_data_are_refused(sweep, tmp_path):
    results.write(tmp_path / 'results' / 'runs.csv', results.COLUMNS, [row('rates', 'dense', '0.0001', 0, data='abc')])
    with pytest.raises(train_real_llm.CheckError, match='runs.csv: its rows are of other data, abc, than'):
        sweep(Trainer())


def test_sigterm_reaches_the_command_that_runs(tmp_path, monkeypatch):
    program, begun = tmp_path / 'upcycle', tmp_path / 'begun'
    program.write_text(f"#!/bin/sh\ntrap 'exit 75' TERM\ntouch {begun}\nwhile :; do sleep 0.02; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(program))
    old = signal.getsignal(signal.SIGTERM)

    def stop():
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        programs = train_real_llm.Programs()
        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(SystemExit) as stopped:
            programs.run(['train'])
        thread.join()
        assert stopped.value.code == 75
        with pytest.raises(SystemExit):
            programs.run(['train'])  # nothing is started any more
        program.write_text('#!/bin/sh\nexit 2\n')
        with pytest.raises(SystemExit, match='upcycle train ended with status 2'):
            train_real_llm.Programs().run(['train'])
    finally:
        signal.signal(signal.SIGTERM, old)


def test_tables_and_picture_of_any_number_of_rows(tmp_path):
    file = tmp_path / 'runs.csv'
    assert results.table(results.read(file)) == 'no run is finished\n'
    picture.draw([], [], tmp_path / 'empty.png')
    losses = {f'{text} loss': '2.0' for text in results.TEXTS}
    results.append(file, results.COLUMNS, [row('start', 'dense', '', '', loss='2.0', **losses)])
    results.append(file, results.COLUMNS, [row('rates', 'dense', '0.0001', 0, loss='1.9')])
    assert '| 0.0001 | 1.9000 (1) | – (0) |' in results.table(results.read(file))
    for seed, loss in ((3, 1.5), (4, 1.6)):
        for branch, gain in (('dense', 0.0), ('upcycled', 0.1 if seed == 3 else 0.2)):
            ends = {name: str(loss - gain) for name in losses}
            results.append(file, results.COLUMNS, [row('continued', branch, '0.0001', seed, loss='1', **ends)])
    # The same run again replaces its row.
    results.append(file, results.COLUMNS, [row('rates', 'dense', '0.0001', 0, loss='1.8')])
    rows = results.read(file)
    assert len(rows) == 6
    table = results.table(rows)
    assert '| 0.0001 | 1.8000 (1) |' in table
    # exp(2); exp(1.5) and exp(1.6); a paired difference of -0.1 and -0.2.
    assert '| Bible | 7.389 | 4.717 ± 2.994 |' in table and '-0.1500 ± 0.6353 |' in table
    curves = [
        {**dict(zip(results.KEY, ('continued', 'dense', '0.0001', '3'), strict=True)), 'step': step, 'TFLOP': step}
        | {'split': 'validation', 'loss': 2 - step}
        for step in (0, 1)
    ]
    picture.draw(rows, curves, tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').read_bytes() != (tmp_path / 'empty.png').read_bytes()


def test_the_schedule_that_the_docstring_promises():
    sizes = schedule.Sizes()
    text = ' '.join(train_real_llm.__doc__.split())
    for promise in (
        'Peaks of 3e-5, 1e-4 and 3e-4',
        f'{sizes.rate_steps} steps each',
        f'on {sizes.eval_batches} batches',
        f'{sizes.steps} steps of the upcycled model',
        f'{sizes.text_batches} batches of held-out code',
        f'{sizes.chat_steps} steps of the upcycled model',
        f'Rows of {sizes.length} tokens',
        f'with {sizes.experts} experts',
    ):
        assert promise in text
    assert (sizes.rates, sizes.rate_seeds, sizes.seeds) == ((3e-5, 1e-4, 3e-4), (0, 1, 2), (3, 4, 5))


@pytest.mark.exhaustive
@pytest.mark.parametrize('experts', [None, 4])
def test_conversations_through_a_model_and_back(experts, tmp_path, dense_llm, capsys):
    """From a folder with a chat template to one that answers; the loss is that of the answers."""
    dense, folder, out = (tmp_path / name for name in ('dense', 'moe' if experts else 'dense', 'out'))
    transfer(dense_llm, str(dense), 'huggingface', optimizer_state='none')
    tokens.write_tokenizer(dense, tokens.CHATML)
    if experts:
        convert(('moe/llm.gin',), dense, folder, format='huggingface', NUM_EXPERTS=experts)
    documents = [
        Document(f'module_{i}.py', split, SOURCE.format('And frees its memory, too.').encode())
        for i, split in enumerate(('train', 'train', 'validation'))
    ]
    made = conversations.conversations(documents, {'train': 6, 'validation': 3})
    for split, chats in made.items():
        (tmp_path / f'{split}.jsonl').write_text(''.join(json.dumps(chat) + '\n' for chat in chats))
    shards = tmp_path / 'shards'
    held_out = [str(tmp_path / 'validation.jsonl')]
    tokenize.run(
        [str(tmp_path / 'train.jsonl')], str(folder), str(shards), chat=True, validation_from=held_out, workers=1
    )
    bindings = {**runs.LLM_STEPS, 'SEQUENCE_LENGTH': '256', 'INITIAL_CHECKPOINT_PATH': str(folder), 'TRAIN_STEPS': '2'}
    bindings |= {
        'TOKENS_DIR': str(shards),
        'MODEL_DIR': str(tmp_path / 'run'),
        'EVAL_STEPS': 'None',
        'WARMUP_STEPS': '1',
    }
    files = (schedule.FROM_CHECKPOINT, schedule.TOKENS, 'runs/finetune_llm.gin')
    train.run(files, bindings)
    first = read_metrics(tmp_path / 'run' / 'metrics.jsonl')[0]
    assert first['loss'] == pytest.approx(loss_of_answers(folder, made['validation']), rel=1e-5)
    transfer(str(tmp_path / 'run'), str(out), 'huggingface', optimizer_state='none')
    assert chat_template_of(out) == tokens.CHATML
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        assert (out / name).read_bytes() == (dense / name).read_bytes()
    question = made['validation'][0]['messages'][0]['content']
    code, answer, error = call(
        ['generate', f'--from={out}', '--chat', f'--prompt={question}', '--max_new_tokens=4'], capsys
    )
    assert code == 0 and answer, error


def loss_of_answers(folder, chats):
    """The mean loss of the tokens in the assistant's text, each given all before it."""
    model, params = upcycle.load(folder)
    tokenizer, total, number = open_tokenizer(folder), 0.0, 0
    for each in chats:
        question, answer = (message['content'] for message in each['messages'])
        before = f'<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n'
        ids = tokenizer.encode([before + f'{answer}<|im_end|>\n'])[0].astype(np.int32)
        length = len(tokenizer.encode([before])[0])
        logits = np.asarray(model.logits(params, {'tokens': ids[None]}), np.float64)[0, length - 1 : -1]
        total += float((scipy.special.logsumexp(logits, axis=-1) - logits[np.arange(len(logits)), ids[length:]]).sum())
        number += len(logits)
    return total / number
