"""`upcycle generate` on folders of Hugging Face: the texts, the ways to name prompts, refusals."""

import functools
import io
import json
import types

import numpy as np
import pytest

import upcycle
from tests.checkpoints.vits import ours
from tests.fixtures import fixtures_dir, requires_fixtures
from tests.moe.quick import jit
from tests.test_cli import call
from upcycle.data.causal import prompts

LLAMA = fixtures_dir() / 'llm' / 'llama'
T5 = fixtures_dir() / 't5x_dense_legacy'
BYTES = '--tokenizer=bytes'  # of ASCII, which the models of the fixtures have room for
NEW = '--max_new_tokens=6'


@functools.cache
def loaded():
    return upcycle.load(LLAMA)


def generate(capsys, *options, source=LLAMA):
    code, out, err = call(['generate', f'--from={source}', NEW, *options], capsys)
    assert code == 0, err
    return out


def follows(result):
    """Whether each token is the most probable one after the text before it."""
    model, params = loaded()
    prompt, tokens = list(result['prompt'].encode()), result['tokens']
    text = np.array([[*prompt, *tokens]])
    best = jit(model.logits)(params, {'tokens': text})[0].argmax(axis=-1)
    return tokens == best[len(prompt) - 1 : -1].tolist()


@requires_fixtures
def test_prompts_of_different_lengths_and_one_printed_as_it_comes(capsys, tmp_path, monkeypatch):
    prompts = ['A longer prompt', 'B']
    lines = generate(capsys, BYTES, '--json', *(f'--prompt={prompt}' for prompt in prompts)).splitlines()
    results = list(map(json.loads, lines))
    assert [result['prompt'] for result in results] == prompts
    assert all(map(follows, results)) and len(results[0]['tokens']) == 6 and not results[0]['ended']
    (tmp_path / 'prompts.txt').write_text('\n'.join([*prompts, '']))
    shown = generate(capsys, BYTES, f'--prompts_file={tmp_path / "prompts.txt"}')
    texts = [result['text'] for result in results]
    assert shown == f'--- 1: A longer prompt\n{texts[0]}\n--- 2: B\n{texts[1]}\n'
    # Standard input is one prompt, without the line break that shells add.
    monkeypatch.setattr('sys.stdin', io.StringIO(f'{prompts[0]}\n'))
    assert generate(capsys, BYTES) == f'{texts[0]}\n'


@requires_fixtures
def test_draws_by_the_seed_and_stops_at_a_token(capsys, tmp_path):
    folder = tmp_path / 'model'
    folder.mkdir()
    for file in ('config.json', 'model.safetensors'):
        (folder / file).symlink_to(LLAMA / file)
    drawn = {}
    for seed in (0, 0, 1):
        options = (BYTES, '--json', '--prompt=A longer prompt', '--temperature=1.0', '--top_k=50', '--top_p=0.9')
        result = json.loads(generate(capsys, *options, f'--seed={seed}', source=folder))
        assert drawn.setdefault(seed, result['tokens']) == result['tokens']
    assert drawn[0] != drawn[1]
    stop = drawn[0][3]
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2, stop]}))
    result = json.loads(generate(capsys, *options, '--seed=0', source=folder))
    until = drawn[0].index(stop)
    assert result['ended'] and result['tokens'] == drawn[0][:until]


@requires_fixtures
@pytest.mark.exhaustive
@pytest.mark.parametrize('name', ['gemma2', 'gemma3_text', 'smollm3', 'mixtral', 'qwen2_moe', 'jetmoe', 'flex_olmo'])
def test_folders_of_all_kinds_equal_teacher_forcing(name):
    """The first prompt is longer than the windows."""
    model, params = upcycle.load(LLAMA.with_name(name))
    tokens = np.random.default_rng(0).integers(3, 100, (2, 12))
    mask = np.ones((2, 12), bool)
    mask[1, :9] = False
    made = np.asarray(model.generate(params, tokens, mask, max_new_tokens=6).tokens)
    text, real = np.concatenate([tokens, made], axis=1), np.concatenate([mask, np.ones_like(made, bool)], axis=1)
    best = jit(model.logits)(params, {'tokens': text, 'mask': real}).argmax(axis=-1)
    np.testing.assert_array_equal(made, best[:, 11:-1])


@pytest.mark.parametrize(
    ('kind', 'files', 'expected'),
    [
        ('upcycle', ['huggingface/tokenizer.json', 'tokenizer.json'], 'huggingface'),
        ('upcycle', ['checkpoints/4/metadata/huggingface/tokenizer.model'], 'checkpoints/4/metadata/huggingface'),
        ('upcycle', ['tokenizer.json'], '.'),
        ('huggingface', ['checkpoints/4/tokenizer.json', 'tokenizer.json'], 'checkpoints/4'),
        ('upcycle', [], 'bytes'),
    ],
)
def test_where_a_tokenizer_lies(kind, files, expected, tmp_path):
    step = tmp_path / 'checkpoints' / '4'
    step.mkdir(parents=True)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text('{}')
    data = {'fingerprint': {'tokenizer': {'kind': 'bytes'}}}
    found = prompts.tokenizer_of(types.SimpleNamespace(path=str(step), format=kind, data=data))
    assert found == (expected if expected == 'bytes' else str(tmp_path / expected))


@requires_fixtures
@pytest.mark.parametrize(
    ('source', 'options', 'message'),
    [
        ('nowhere', (), 'nowhere does not exist'),
        (LLAMA, (), 'has no tokenizer: name one with --tokenizer'),
        (LLAMA, (BYTES, '--prompts_file=a'), '--prompt and --prompts_file'),
        (LLAMA, (BYTES, '--prompt='), 'prompt 2 is empty'),
        (LLAMA, (BYTES, '--prompt=é'), 'prompt 2 has the token 195, and the model only 128'),
        (LLAMA, (BYTES, '--prompt=\udcff'), 'prompt 2 is not UTF-8'),
        (LLAMA, (BYTES, '--seed=-1'), '--seed=-1'),
        (LLAMA, (BYTES, '--chat'), 'bytes has no chat template'),
        (LLAMA, (BYTES, '--temperature=-1'), 'temperature = -1'),
        (LLAMA, (BYTES, '--max_new_tokens=0'), '--max_new_tokens'),
        (T5, (BYTES,), 'whose prompts end with an end token'),
        ('vit.npz', (BYTES,), 'a ViT generates no text'),
    ],
)
def test_refusals(source, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source == 'vit.npz':
        np.savez(source, **{name.removeprefix('params/'): leaf for name, leaf in ours().items()})
    code, out, err = call(['generate', f'--from={source}', '--prompt=a', *options], capsys)
    assert code == 2 and not out and message in err, err


@requires_fixtures
def test_a_prompt_that_is_not_utf_8(capsys, monkeypatch):
    monkeypatch.setattr('sys.stdin', io.StringIO('\udcff'))
    code, _, err = call(['generate', f'--from={LLAMA}', BYTES], capsys)
    assert code == 2 and 'standard input cannot be read' in err


@requires_fixtures
@pytest.mark.parametrize('name', ['', 'missing', 'empty'])
def test_prompts_that_are_not_there(name, capsys, tmp_path, monkeypatch):
    (tmp_path / 'empty').write_text('\n')
    options = [f'--prompts_file={tmp_path / name}'] if name else []
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr('sys.stdin', terminal)
    code, _, err = call(['generate', f'--from={LLAMA}', BYTES, *options], capsys)
    words = {'': 'there is no prompt', 'missing': 'cannot be read', 'empty': 'is empty'}[name]
    assert code == 2 and words in err
