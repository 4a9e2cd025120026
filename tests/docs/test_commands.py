"""Every command of the docs runs as it is written, in a folder that holds what it names; only sizes and steps are small."""

import importlib.util
import json
import os
import re
import signal
import types

import numpy as np
import PIL.Image
import pytest

from tests import runs, tokens, vision
from tests.checkpoints import trees
from tests.docs.pages import ROOT, commands, languages, pages
from tests.evaluate import own_tasks
from tests.test_cli import call
from upcycle import configuration, gin_files
from upcycle.api import convert
from upcycle.evaluate import few_shot, tasks, validation
from upcycle.models import identify
from upcycle.training import loop
from upcycle.transfer import transfer

OURS = [command for command in commands() if command.words[0] == 'upcycle']
# Libraries that only `make test-all` installs, by an option that needs them.
OPTIONAL = {'--lm_eval': 'lm_eval'}
# Commands of others: they install, or need the internet.
OTHERS = {'pip', 'python3', '.', 'hf', 'curl', 'tfds', '$T5X/t5x/train.py', 'docker', 'export', 'gcloud', 'xpk'}
# These are only built: what they would run takes too long, and is run at a small size elsewhere.
BUILT_ONLY = {
    'compile': 'a program for 64 chips takes minutes: tests/test_compile.py compiles for 8',
    'sweep': 'a grid takes hours, so its points are built and printed: tests/sweep runs small ones',
}
# These runs are trained, and this page's evaluated; the others stop before their first step, when all is checked.
TRAINED = {
    ('getting_started.md', 'runs/dense'),
    ('getting_started.md', 'runs/upcycled'),
    ('getting_started.md', 'runs/continued'),
    ('your_checkpoint.md', 'runs/photos'),
    ('llm.md', 'run'),
}
# What the reader has, and where a small one of the kind lies in the folder.
THEIRS = {
    'gs://t5-data/pretrained_models/t5x/t5_1_1_base/checkpoint_1000000': 't5x',
    '/path/to/dense_vit': 'dense_vit',
    '/path/to/finetuned': 'dense',
    '/path/to/sparse_vit': 'sparse_vit',
    '/path/to/sparse': 'sparse',
    '/path/to/dense': 'dense',
    '/path/to/llm': 'llm',
}
# What cannot be had here: by its shapes, and by something small that can be trained on.
TASKS = {
    'tasks/c4_span_corruption.gin': ('tasks/synthetic_text.gin', runs.TASK),
    'tasks/superglue.gin': ('tasks/synthetic_text.gin', runs.TASK),
    'tasks/imagenet2012.gin': ('tasks/synthetic_images.gin', vision.TASK),
    'tasks/imagenet21k.gin': ('tasks/synthetic_images.gin', vision.TASK),
}
SMALL_VALUES = {
    'DENSE_STEP=1000000': '4',
    'REPRESENTATION_SIZE=768': '16',
    'NUM_CLASSES=21843': '10',
    'FEW_SHOT_TRAIN_SPLIT=train[:10%]': 'train',
    'IMAGE_SIZE=384': '32',
}
SMALL_TEXT = {**runs.SMALL_STEPS, 'EVAL_BATCH_SIZE': '4', 'NUM_EMBEDDINGS': '384'}
SMALL_TOKENS = {**runs.LLM_STEPS, 'EVAL_BATCH_SIZE': '4'}
SMALL_IMAGES = {
    **vision.TINY,
    'IMAGE_SIZE': '28',
    'IMAGE_CHANNELS': '1',
    'RESIZE_SMALL': '32',
    'RESTART_WARMUP_STEPS': '1',
}


@pytest.fixture(scope='module')
def inputs(dense, dense_vit, dense_llm, upcycled, tmp_path_factory):
    """A folder with what the commands start from, under the names that they use."""
    import sentencepiece

    folder = tmp_path_factory.mktemp('inputs')
    os.symlink(dense, folder / 'dense')
    os.symlink(dense_vit, folder / 'dense_vit')
    os.symlink(upcycled, folder / 'sparse')
    transfer(dense, str(folder / 't5x'), 't5x_legacy')
    transfer(dense, str(folder / 'flan-t5-base'), 'huggingface', optimizer_state='none')
    with_token = runs.build('vit dense', folder / 'unused', 1, POOLING='token', REPRESENTATION_SIZE=16)
    tree = {name: np.zeros(shape, np.float32) for name, shape in identify.shapes(with_token.model).items()}
    trees.write(folder / 'ViT-B_16.npz', 'vit_npz', tree)
    tree = {name: leaf for name, leaf in tree.items() if 'pre_logits' not in name}
    facts = {'gelu': 'erf', 'norm_epsilon': 1e-12}
    trees.write(folder / 'vit-base', 'huggingface', tree, {'facts': facts})
    trees.write(folder / 'vit_token.npz', 'vit_npz', tree)
    sizes = {name: value for name, value in vision.TINY.items() if name.startswith(('EMBED', 'MLP', 'NUM'))}
    small = {**sizes, 'NUM_EXPERTS': 4, 'POOLING': 'token', 'DENSE_STEP': 4}
    convert(
        (vision.MODEL, 'moe/vit.gin'), folder / 'vit_token.npz', folder / 'sparse_vit', OPTIMIZER_STATE='fresh', **small
    )
    (folder / 'corpus').mkdir()
    for i in range(30):
        text = f'Every expert starts as a copy of the dense model, {i} of them.\n' * 40
        (folder / 'corpus' / f'{i}.txt').write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / 'corpus' / '0.txt'),
        model_prefix=str(folder / 'flan-t5-base' / 'spiece'),
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    transfer(dense_llm, str(folder / 'llm'), 'huggingface', optimizer_state='none')
    tokens.write_tokenizer(folder / 'llm', tokens.CHATML)
    (folder / 'articles.jsonl').write_text(''.join(json.dumps({'body': text}) + '\n' for text in tokens.TEXTS))
    (folder / 'chat.jsonl').write_text((json.dumps({'messages': tokens.MESSAGES}) + '\n') * 4)
    own_tasks.write(folder / 'own_tasks')
    for name in ('cat', 'dog', 'bird'):
        (folder / 'photos' / name).mkdir(parents=True)
        for i in range(30):
            PIL.Image.new('L', (30, 40), i).save(folder / 'photos' / name / f'{i}.jpg')
    return folder


@pytest.fixture
def small(inputs, tmp_path, monkeypatch):
    """Goes into a folder with the inputs, where every run is built as it is written, and then small.

    Yields what builds it as it is written and no more, by the functions of `configuration` that build.
    """
    for entry in os.listdir(inputs):
        os.symlink(inputs / entry, tmp_path / entry)
    settings = {'t5': SMALL_TEXT, 'vit': SMALL_IMAGES, 'llm': SMALL_TOKENS}
    for family, macros in settings.items():
        lines = [f'{name} = {gin_files.literal(value)}' for name, value in {**macros, 'NUM_EXPERTS': '4'}.items()]
        (tmp_path / f'small_{family}.gin').write_text('\n'.join([*lines, '']))
    builders = {name: getattr(configuration, name) for name in ('load', 'load_model')}

    def as_written(load):
        return lambda files, bindings: load([TASKS[file][0] if file in TASKS else file for file in files], bindings)

    def in_small(load):
        def load_small(files, bindings):
            run = as_written(load)(files, bindings)
            family = next(
                (name for name in settings if any(file.startswith(f'models/{name}_') for file in files)),
                'llm' if gin_files.FROM_CHECKPOINT in files else None,
            )
            if family is None:
                return run
            # That of the checkpoint of a decoder-only model is small.
            model = {'t5': runs.TINY, 'vit': vision.MODEL}.get(family)
            files = [model if model and f.startswith('models/') else TASKS[f][1] if f in TASKS else f for f in files]
            steps = {'TRAIN_STEPS': '6' if 'INITIAL_CHECKPOINT_PATH' in bindings else '4'}
            dropped = {*settings[family], 'NUM_EXPERTS', 'TRAIN_STEPS'}
            kept = {
                name: SMALL_VALUES.get(f'{name}={value}', value)
                for name, value in bindings.items()
                if name not in dropped
            }
            return load([*files, f'small_{family}.gin'], kept | (steps if load is builders['load'] else {}))

        return load_small

    for name, load in builders.items():
        monkeypatch.setattr(configuration, name, in_small(load))
    monkeypatch.chdir(tmp_path)
    old = signal.getsignal(signal.SIGTERM)
    yield {name: as_written(load) for name, load in builders.items()}
    signal.signal(signal.SIGTERM, old)


def arguments_of(command):
    found = []
    for word in command.words[1:]:
        for theirs, here in THEIRS.items():
            word = word.replace(theirs, here)
        found.append(word)
    return [*found, '--where=print'] if found[0] == 'sweep' else found


# Pages whose commands take 9 s each of CPU time.
SELDOM = ('operators.md', 'your_checkpoint.md')


@pytest.mark.parametrize(
    'page',
    [
        pytest.param(page, marks=[pytest.mark.exhaustive] if page in SELDOM else [])
        for page in dict.fromkeys(command.page for command in OURS)
    ],
)
def test_commands_of_a_page(page, small, capsys, monkeypatch):
    train_loop = loop.train
    monkeypatch.setattr(
        loop, 'train', lambda start, *more: train_loop(start, *more) if (page, start.run.model_dir) in TRAINED else None
    )
    if page not in dict(TRAINED):
        monkeypatch.setattr(validation, 'evaluate', lambda *arguments: {})
        monkeypatch.setattr(few_shot, 'evaluate', lambda *arguments: {})
        idle = types.SimpleNamespace(evaluate=lambda params: {})
        monkeypatch.setattr(tasks, 'TaskEvaluator', lambda *arguments: idle)
        # Random tokens stand for the task.
        monkeypatch.setattr(tasks.TaskMetrics, 'check_data', lambda *arguments: None)

    def stopping(build):
        def stop(files, bindings):
            build(files, bindings)
            raise SystemExit(0)  # the run is built

        return stop

    for command in OURS:
        options = {word.partition('=')[0] for word in command.words}
        missing = [
            name for option, name in OPTIONAL.items() if option in options and not importlib.util.find_spec(name)
        ]
        if command.page != page or missing:
            continue
        arguments = arguments_of(command)
        with monkeypatch.context() as patch:
            if arguments[0] in BUILT_ONLY:
                for name, build in small.items():
                    patch.setattr(configuration, name, stopping(build) if arguments[0] == 'compile' else build)
            code, _, error = call(arguments, capsys)
        assert code == 0, f'{command}\n{error}'


def test_every_fence_is_one_that_is_looked_at():
    for page in pages():
        # tests/api/test_page.py runs the one page in Python, tests/evaluate/own_tasks.py has the one task in YAML.
        others = {'api.md': {'python'}, 'evaluation.md': {'bash', 'yaml'}}
        assert set(languages(page)) <= others.get(page.name, {'bash'}), page.name
    assert len(OURS) > 20


def test_commands_are_complete():
    for command in commands():
        assert '...' not in ' '.join(command.words), command
        script = command.words[1] if command.words[0] == 'python' else command.words[0]
        assert script in {'upcycle', 'make', *OTHERS} or (ROOT / script).is_file(), command


def test_what_is_built_only_is_in_the_docs():
    assert set(BUILT_ONLY) <= {command.words[1] for command in OURS}


def test_make_has_these_targets():
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    wanted = {command.words[1] for command in commands() if command.words[0] == 'make'}
    assert {'quickstart', 'test', 'docs'} <= wanted <= targets
