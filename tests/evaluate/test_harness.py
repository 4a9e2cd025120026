"""`upcycle eval --lm_eval` gives the figures of lm-eval's own class for transformers, on tasks with local data.

Needs `pip install upcycle[hf]` (lm-eval, transformers, PyTorch; the CPU build is enough), and is skipped without it.
"""

import json
import os
import subprocess
import sys

import pytest

from tests import tokens
from tests.docs.pages import ROOT
from tests.evaluate import own_tasks
from tests.test_cli import call

# Nothing is fetched. Before the libraries are imported.
os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1')
_WHY = 'needs `pip install upcycle[hf]`: no task of lm-eval is run'
for _module in ('lm_eval', 'accelerate', 'torch', 'transformers'):
    pytest.importorskip(_module, reason=_WHY)

from lm_eval import evaluator  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from tests.checkpoints import torch_models  # noqa: E402
from upcycle.evaluate import harness  # noqa: E402

pytestmark = pytest.mark.exhaustive

ALL = f'--lm_eval={",".join(own_tasks.TASKS)}'
FAMILIES = {
    'Llama': {},
    'Mixtral': {'num_local_experts': 4, 'num_experts_per_tok': 2, 'sliding_window': 9},
}


@pytest.fixture(scope='module', params=FAMILIES)
def case(request, tmp_path_factory):
    """A folder of the family, tasks of which some answers are the model's, and the class of transformers with that model."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {'vocab_size': 300, 'bos_token_id': 0, 'eos_token_id': 1, 'pad_token_id': None}
    torch_models.make(request.param, **sizes, **FAMILIES[request.param]).save_pretrained(folder / 'model')
    tokens.write_tokenizer(folder / 'model')
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>'}
    (folder / 'model' / 'tokenizer_config.json').write_text(json.dumps(config))
    # Its rows with a stop string run on until all rows of the batch have one.
    theirs = HFLM(pretrained=str(folder / 'model'), device='cpu', dtype='float32', batch_size=1)
    questions = own_tasks.write(folder / 'tasks')
    answers = theirs.generate_until([_Request((text, {'max_gen_toks': 12})) for text in questions])
    # A string in the middle of an answer, of which some are cut.
    stop = next(answer for answer in answers if len(answer) > 4)[2:4]
    right = [answer.split(stop)[0] for answer in answers[:5]]
    own_tasks.write(folder / 'tasks', right, (stop,))
    return folder, theirs


class _Request:
    """A request of lm-eval."""

    def __init__(self, args):
        self.args, self.task_name = args, 'own'


def by_theirs(folder, theirs, num_fewshot=None):
    loaded = harness.load_tasks(','.join(own_tasks.TASKS), str(folder / 'tasks'), num_fewshot)
    results = evaluator.evaluate(theirs, loaded, bootstrap_iters=0, log_samples=False)['results']
    return {task: harness._scalars(values) for task, values in results.items()}


def by_ours(capsys, folder, *options):
    command = ['eval', f'--from={folder}/model', ALL, f'--include_path={folder}/tasks', '--json', *options]
    code, out, err = call(command, capsys)
    assert code == 0, err
    return json.loads(out)


def test_figures_are_those_of_transformers(case, capsys):
    folder, theirs = case
    expected, result = by_theirs(folder, theirs), by_ours(capsys, folder, f'--out={folder}/result.json')
    assert json.loads((folder / 'result.json').read_text()) == result
    assert 0.4 < expected['own_answers']['exact_match'] < 1 and 0 < expected['own_choices']['acc'] < 1
    for task, metrics in expected.items():
        for name, value in metrics.items():
            assert result['metrics'][task][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (task, name)
    names = {'own_choices': 'acc', 'own_last_word': 'perplexity', 'own_rolling': 'bits_per_byte'}
    assert all(name in expected[task] for task, name in names.items())
    assert result['lm_eval']['max_length'] == 64 and result['lm_eval']['n-samples']['own_choices']['effective'] == 12


def test_few_shots_and_limits(case, capsys):
    folder, theirs = case
    expected = by_theirs(folder, theirs, num_fewshot=2)['own_choices']
    result = by_ours(capsys, folder, '--num_fewshot=2', '--batch_size=3')
    assert result['metrics']['own_choices']['acc_norm'] == pytest.approx(expected['acc_norm'], abs=1e-3)
    assert result['lm_eval']['n-shot']['own_choices'] == 2
    assert result['lm_eval']['batch_size'] == 3
    result = by_ours(capsys, folder, '--limit=0.5', '--max_length=32')
    assert result['lm_eval']['n-samples']['own_choices']['effective'] == 6
    assert result['lm_eval']['max_length'] == 32


only_llama = pytest.mark.parametrize('case', ['Llama'], indirect=True)


def close(one, other):
    """Whether all figures of two results agree."""
    assert one.keys() == other.keys()
    for task, metrics in one.items():
        assert metrics == pytest.approx(other[task], rel=1e-4, abs=1e-6), task


def test_on_a_mesh_without_tensorflow(case, capsys):
    folder, _ = case
    options = [f'--from={folder}/model', ALL, f'--include_path={folder}/tasks', f'--out={folder}/mesh.json']
    command = [sys.executable, '-m', 'tests.evaluate.harness_on_a_mesh', *options]
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    environment = {**os.environ, 'PYTHONPATH': path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    close(json.loads((folder / 'mesh.json').read_text())['metrics'], by_ours(capsys, folder)['metrics'])


@only_llama
def test_a_dense_folder_is_upcycled_on_the_way(case, capsys):
    folder, _ = case
    files = ('models/from_checkpoint.gin', 'moe/llm.gin', 'runs/upcycle.gin')
    bindings = ('NUM_EXPERTS=4', 'ACTIVATION_DTYPE=float32', "DISPATCH='gather'")
    options = [f'--gin_file={file}' for file in files] + [f'--gin.{binding}' for binding in bindings]
    result, dense = by_ours(capsys, folder, *options), by_ours(capsys, folder)
    assert result['operator'] == 'copy' and dense['operator'] is None
    close(result['metrics'], dense['metrics'])


@only_llama
def test_a_run_needs_no_data(dense_llm, case, capsys):
    """It was trained on random bytes, and reads as many tokens as its rows have."""
    folder, _ = case
    tasks = [f'--include_path={folder}/tasks', '--lm_eval=own_rolling', '--tokenizer=bytes', '--json']
    code, out, err = call(['eval', f'--from={dense_llm}', *tasks], capsys)
    assert code == 0, err
    result = json.loads(out)
    assert result['step'] == 4 and result['lm_eval']['max_length'] == 32
    assert 6 < result['metrics']['own_rolling']['bits_per_byte'] < 12


@only_llama
def test_a_table(case, capsys):
    folder, _ = case
    tasks = [f'--include_path={folder}/tasks', '--lm_eval=own_rolling, own_choices']
    code, out, err = call(['eval', f'--from={folder}/model', *tasks, '--limit=2'], capsys)
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [line[:2] for line in lines[1:]] == [
        *(['own_rolling', name] for name in ('word_perplexity', 'byte_perplexity', 'bits_per_byte')),
        *(['own_choices', name] for name in ('acc', 'acc_stderr', 'acc_norm', 'acc_norm_stderr')),
    ]


MISTAKES = {
    'unknown task': (['--lm_eval=own_choices,own_choice'], "has no task 'own_choice'"),
    'no task': (['--lm_eval=,'], '--lm_eval=, names no task'),
    'no folder': (['--include_path=nowhere'], '--include_path=nowhere is not a folder'),
    'no data': (['--lm_eval=broken_data'], '--lm_eval=broken_data cannot be loaded'),
    'field': (['--lm_eval=broken_field'], '--lm_eval: the tasks cannot be evaluated'),
    'beams': (['--lm_eval=broken_beams'], 'the task broken_beams has num_beams = 2 in its generation_kwargs'),
    'vocabulary': (['--lm_eval=own_rolling', '--tokenizer={more}'], 'and the model only 300 tokens'),
    'limit': (['--limit=0'], '--limit=0 must be above 0'),
    'shots': (['--num_fewshot=-1'], '--num_fewshot=-1 must be at least 0'),
    'rows': (['--batch_size=0'], '--batch_size=0 must be at least 1'),
    'few shot': (['--few_shot'], '--few_shot and --lm_eval are separate'),
    'unused binding': (['--gin.NUM_EXPERTS=4'], 'NUM_EXPERTS=4 is unused'),
}


@only_llama
@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_sentence(mistake, case, capsys, tmp_path):
    folder, _ = case
    more, message = MISTAKES[mistake]
    tasks = tmp_path / 'tasks'
    own_tasks.write(tasks)
    # The library tries the first.
    last = f"{{{{text if text != '{own_tasks.DOCUMENTS[-1]}' else no.field}}}}"
    rolling, answers = ((tasks / f'{name}.yaml').read_text() for name in ('rolling', 'answers'))
    (tasks / 'a.yaml').write_text(rolling.replace('own_rolling', 'broken_data').replace('texts.jsonl', 'gone.jsonl'))
    (tasks / 'b.yaml').write_text(rolling.replace('own_rolling', 'broken_field').replace('{{text}}', last))
    (tasks / 'c.yaml').write_text(
        answers.replace('own_answers', 'broken_beams').replace('{until', '{num_beams: 2, until')
    )
    tokenizer = tmp_path / 'more'
    tokenizer.mkdir()
    tokens.write_tokenizer(tokenizer)
    content = json.loads((tokenizer / 'tokenizer.json').read_text())
    content['model']['vocab']['x'] = 400
    (tokenizer / 'tokenizer.json').write_text(json.dumps(content))
    more = [option.format(more=tokenizer) for option in more]
    options = {'--from': f'{folder}/model', '--lm_eval': 'own_choices', '--include_path': str(tasks)}
    for option in more:
        options.pop(option.partition('=')[0], None)
    command = ['eval', *(f'{name}={value}' for name, value in options.items()), *more, f'--out={tmp_path}/out.json']
    code, out, err = call(command, capsys)
    last = next(line for line in err.splitlines() if line.startswith('upcycle: '))
    assert code == 2 and not out and message in last, err
    assert not (tmp_path / 'out.json').exists()


@only_llama
def test_only_models_that_continue_a_text(dense, case, capsys):
    folder, _ = case
    command = ['eval', f'--from={dense}', '--lm_eval=own_rolling', f'--include_path={folder}/tasks']
    code, _, err = call(command, capsys)
    assert code == 2 and 'and this is a T5: name a language model' in err
