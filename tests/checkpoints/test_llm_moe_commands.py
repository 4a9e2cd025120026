"""`import` and `export` of folders with experts: there and back bit for bit; --layout and --for."""

import pytest

from tests.checkpoints import llms, trees
from tests.fixtures import requires_fixtures
from tests.test_cli import call
from upcycle.checkpoints import open_checkpoint

pytestmark = requires_fixtures


@pytest.fixture
def export(capsys):
    def run(source, target, *options):
        return call(['export', f'--from={source}', f'--to={target}', '--format=huggingface', *options], capsys)

    return run


def test_through_a_checkpoint_of_ours(tmp_path, export, capsys):
    name, ours, theirs = 'qwen2_moe', tmp_path / 'ours', tmp_path / 'theirs'
    assert call(['import', f'--from={llms.FOLDERS / name}', f'--to={ours}'], capsys)[0] == 0
    assert export(ours, theirs)[0] == 0
    before, after = llms.tensors_of(llms.FOLDERS / name), llms.tensors_of(theirs)
    assert {key: x.tobytes() for key, x in before.items()} == {key: x.tobytes() for key, x in after.items()}
    assert open_checkpoint(theirs).metadata['model'] == open_checkpoint(llms.FOLDERS / name).metadata['model']


def test_a_named_layout_and_a_binding_engine(tmp_path, export):
    source, target = llms.FOLDERS / 'upcycle_llama_to_mixtral' / 'moe', tmp_path / 'x'
    code, _, error = export(source, target, '--layout=qwen3_moe')
    assert code == 2 and "--layout=qwen3_moe cannot store this model: qk_norm = 'none' would become 'head'" in error
    code, _, error = export(source, target, '--layout=qwen2_moe', '--for=llama.cpp')
    assert code == 2 and 'llama.cpp never divides the weights of the chosen experts' in error
    assert not list(tmp_path.iterdir())
    code, _, error = export(source, target, '--layout=granitemoe', '--for=transformers,vllm,llama.cpp')
    assert code == 0 and 'warning' not in error
    reader, original = open_checkpoint(target), open_checkpoint(source)
    assert reader.metadata['model_type'] == 'granitemoe'
    trees.assert_same(reader, {leaf: original.read(leaf) for leaf in original.leaves()})


def test_options_of_folders_need_the_format(tmp_path, capsys):
    source = llms.FOLDERS / 'mixtral'
    for option in ('--layout=mixtral', '--for=vllm'):
        code, _, error = call(
            ['export', f'--from={source}', f'--to={tmp_path / "x"}', '--format=upcycle', option], capsys
        )
        assert code == 2 and f'{option} needs --format=huggingface' in error
