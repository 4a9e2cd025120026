"""Router columns from a file of prompts for each expert: against states computed prompt by prompt; receipts; refusals."""

import functools
import hashlib
import json
import re
import shutil

import numpy as np
import pytest

import upcycle
from tests import runs
from tests.checkpoints import llms
from tests.fixtures import requires_fixtures
from tests.moe.quick import jit
from tests.test_cli import call
from upcycle import router_prompts
from upcycle.checkpoints import open_checkpoint
from upcycle.errors import UserError
from upcycle.gin_files import FROM_CHECKPOINT
from upcycle.models.activations import prompt_activations
from upcycle.surgery.plan import Surgery

pytestmark = requires_fixtures

DENSE = 'llama'
FILES = {
    'code': 'w1 w2 w3 w4 w5\n\n w6 w7\n',
    'maths': 'w30 w31 w32\n',
    'prose': 'w11 w12 w13 w14 w15 w16 w17 w18 w19\nw20\nw21 w22 w23\n',
}


@pytest.fixture
def source(tmp_path):
    """A dense folder with a tokenizer of words, and files of prompts next to it."""
    import tokenizers

    folder = llms.copy(DENSE, tmp_path / 'dense')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f'w{i}': i for i in range(40)}, unk_token='w0'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / 'tokenizer.json'))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return folder


def bindings(tmp_path, *names, **more):
    paths = repr(tuple(str(tmp_path / name) for name in names))
    values = {'ROUTER_INIT': 'hidden', 'ROUTER_PROMPTS': paths, 'NUM_EXPERTS': len(names), **more}
    return [f'--gin.{name}={value}' for name, value in values.items()]


def convert(capsys, sources, target, *options):
    named = [f'--from={each}' for each in sources]
    return call(
        ['convert', *named, f'--to={target}', '--gin_file=moe/llm.gin', '--format=huggingface', *options], capsys
    )


def expected(folder, *names):
    """The unit vectors of mergekit's `hidden` gate, at the inputs of MLPs: each prompt by itself, without padding."""
    model, params = upcycle.load(folder)
    paths = tuple(f'decoder/layers_{i}/mlp' for i in range(model.config.num_layers))
    states = jit(functools.partial(prompt_activations, model, paths=paths))
    rows = {path: [] for path in paths}
    for name in names:
        means = {path: [] for path in paths}
        for line in filter(str.strip, FILES[name].splitlines()):
            tokens = np.array([[int(word[1:]) for word in line.split()]])
            for path, x_1xLxD in states(params, tokens, np.ones_like(tokens, bool)).items():
                means[path].append(np.asarray(x_1xLxD[0]).mean(axis=0))
        for path, each in means.items():
            mean_D = np.mean(each, axis=0)
            rows[path].append(mean_D / np.linalg.norm(mean_D))
    return {path: np.stack(each) for path, each in rows.items()}


def routers_of(path):
    reader = open_checkpoint(path)
    names = [name for name in reader.leaves() if name.startswith('params/') and '/router/' in name]
    return {name.removeprefix('params/').partition('/router')[0]: np.asarray(reader.read(name)) for name in names}


def assert_rows(path, rows, stddev=0.02):
    found = routers_of(path)
    assert found.keys() == rows.keys()
    for name, row_ExD in rows.items():
        np.testing.assert_allclose(found[name].T, stddev * row_ExD.shape[1] ** 0.5 * row_ExD, atol=1e-6)


def test_columns_point_to_the_prompts(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(router_prompts, '_BATCH', 32)  # several batches
    names = ('prose', 'maths', 'code')
    code, output, error = convert(capsys, [source], tmp_path / 'moe', *bindings(tmp_path, *names), '--verify')
    assert code == 0, error
    assert_rows(tmp_path / 'moe', expected(source, *names))
    assert 'logits differ from those of the dense model by at most' in output
    receipt = json.loads((tmp_path / 'moe' / 'upcycle_receipt.json').read_text())
    assert receipt['router_init'] == 'hidden(0.02)'
    assert receipt['router_prompts'] == [
        {'path': str(tmp_path / name), 'sha256': hashlib.sha256(FILES[name].encode()).hexdigest()} for name in names
    ]
    assert len(receipt['function_check']['layers']) == 3


@pytest.mark.exhaustive
@pytest.mark.parametrize('rest', ['first', 'mean'])
def test_branches_read_their_base(rest, source, tmp_path, capsys):
    other, base = tmp_path / 'other', source
    shutil.copytree(source, other)
    (other / 'model.safetensors').unlink()
    tensors = llms.tensors_of(source)
    llms.write(
        other,
        {name: x + 0.1 * np.sin(np.arange(x.size).reshape(x.shape)).astype(x.dtype) for name, x in tensors.items()},
    )
    if rest == 'mean':
        shutil.copytree(source, base := tmp_path / 'base')
        (base / 'model.safetensors').unlink()
        theirs = llms.tensors_of(other)
        llms.write(base, {name: (x + theirs[name]) / 2 for name, x in tensors.items()})
    options = ['--gin_file=surgery/branches.gin', f'--gin.BRANCHES_REST={rest}']
    options += bindings(tmp_path, 'code', 'maths')
    code, _, error = convert(capsys, [source, other], tmp_path / 'moe', *options)
    assert code == 0, error
    assert_rows(tmp_path / 'moe', expected(base, 'code', 'maths'))


@pytest.mark.exhaustive
def test_training_starts_with_them(source, tmp_path, capsys):
    values = {**runs.LLM_STEPS, 'NUM_EMBEDDINGS': 128, 'MODEL_DIR': tmp_path / 'run', 'WARMUP_STEPS': 2}
    values |= {'INITIAL_CHECKPOINT_PATH': source, 'TRAIN_STEPS': 1, 'CHECKPOINT_PERIOD': 1, 'BASE_LEARNING_RATE': 0.0}
    files = (FROM_CHECKPOINT, 'moe/llm.gin', runs.LLM_TASK, 'runs/upcycle.gin')
    named = [f'--gin_file={file}' for file in files] + [f'--gin.{name}={value}' for name, value in values.items()]
    code, _, error = call(['train', *named, *bindings(tmp_path, 'code', 'maths')], capsys)
    assert code == 0, error
    assert_rows(tmp_path / 'run', expected(source, 'code', 'maths'))
    receipt = json.loads((tmp_path / 'run' / 'receipt.json').read_text())
    assert [file['path'] for file in receipt['router_prompts']] == [str(tmp_path / name) for name in ('code', 'maths')]


REFUSALS = {
    'missing': (
        ('code', 'nowhere'),
        {},
        'ROUTER_PROMPTS: .*nowhere cannot be read .No such file or directory.: name a file',
    ),
    'count': (
        ('code', 'maths'),
        {'NUM_EXPERTS': 4},
        'ROUTER_PROMPTS names 2 files, and routers have 4 columns: name 4,',
    ),
    'empty': (('code', 'empty'), {}, 'ROUTER_PROMPTS: .*empty is empty: write a prompt on each line'),
    'not text': (('code', 'bytes'), {}, 'ROUTER_PROMPTS: .*bytes cannot be read .*: name a file of UTF-8 text'),
    'too long': (
        ('code', 'long'),
        {},
        'prompt 1 of .*long has 99 tokens, and the model was made for 64: cut it into several',
    ),
    'one name': (('code', 'maths'), {'ROUTER_PROMPTS': "'code'"}, "ROUTER_PROMPTS = 'code' must be a list"),
    'drawn': (
        ('code', 'maths'),
        {'ROUTER_INIT': 'normal'},
        "ROUTER_PROMPTS is read by ROUTER_INIT = 'hidden', not 'normal'",
    ),
}


@pytest.mark.parametrize('case', REFUSALS)
def test_refusals(case, source, tmp_path, capsys):
    names, more, message = REFUSALS[case]
    (tmp_path / 'empty').write_text('\n \n')
    (tmp_path / 'bytes').write_bytes(b'\xff\xfe')
    (tmp_path / 'long').write_text('w1 ' * 99)
    code, _, error = convert(capsys, [source], tmp_path / 'moe', *bindings(tmp_path, *names, **more))
    assert code == 2 and 'Traceback' not in error
    assert re.search(message, error), error
    assert not (tmp_path / 'moe').exists()


def test_without_a_tokenizer_or_with_that_of_another_model(source, tmp_path, capsys):
    options = bindings(tmp_path, 'code', 'maths')
    text = (source / 'tokenizer.json').read_text()
    (source / 'tokenizer.json').write_text(text.replace('"w30":30', '"w30":300').replace('"w30": 30', '"w30": 300'))
    code, _, error = convert(capsys, [source], tmp_path / 'moe', *options)
    assert code == 2 and 'has the token 300, and the model only 128 tokens' in error
    (source / 'tokenizer.json').unlink()
    code, _, error = convert(capsys, [source], tmp_path / 'moe', *options)
    assert code == 2 and f'{source} has no tokenizer, which ROUTER_PROMPTS needs: copy tokenizer.json' in error


def test_equal_prompts_are_said(source, tmp_path, capsys):
    path = str(tmp_path / 'code')
    surgery = Surgery(router_init='hidden', router_prompts=[path, path])
    model = upcycle.sparse(upcycle.load(source)[0], NUM_EXPERTS=2)
    read = router_prompts.read(surgery, model, open_checkpoint(source))
    assert [file.prompts for file in read] == [((1, 2, 3, 4, 5), (6, 7))] * 2
    assert f'{path} has the prompts of {path}, so their experts start with equal router' in capsys.readouterr().err


def test_in_memory_they_are_refused(tmp_path):
    model, params = upcycle.load(llms.FOLDERS / DENSE)
    surgery = Surgery(router_init='hidden', router_prompts=['a'])
    with pytest.raises(UserError, match='router_prompts needs the tokenizer of a checkpoint'):
        upcycle.upcycle(params, upcycle.sparse(model, NUM_EXPERTS=4), surgery, key=0)
