"""The runs of docs/launching.md on slices and GPUs: what their commands configure, and whether it divides among the devices."""

import re

import pytest
from jax.sharding import AbstractMesh

from tests.docs.pages import DOCS, commands
from upcycle import arguments, compile, configuration, cost, partitioning
from upcycle.data.causal import shards, tokenizers
from upcycle.training.start import check_batches
from upcycle.training.state import make_layout

LAUNCHES = [command.words for command in commands() if command.words[0].startswith('scripts/launch/')]


def model_of(words):
    return next(re.search(r'models/(\w+)', word)[1] for word in words if word.startswith('--gin_file=models/'))


def devices_of(words):
    """The number of devices that a launcher asks for."""
    if words[0].endswith('slurm.sh'):
        return int(words[1]) * int(words[2])
    # The names of v5p slices count cores.
    (cores,) = (int(found[1]) for word in words if (found := re.fullmatch(r'v5p-(\d+)', word)))
    return cores // compile.CHIPS['v5p'].cores


def configured(words, tokens):
    """The run that a launcher starts."""
    options, rest = arguments.parser().parse_known_args(words[words.index('train') :])
    assert all(argument.startswith('--gin.') for argument in rest)
    bindings = dict(argument.removeprefix('--gin.').split('=', 1) for argument in rest)
    return configuration.load(options.gin_files, bindings | {'TOKENS_DIR': str(tokens)})


def mesh_of(run):
    return AbstractMesh(run.mesh_shape, partitioning.MESH_AXES)


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    """A folder of shards by Llama 3's tokenizer, without documents."""
    folder = tmp_path_factory.mktemp('tokens')
    identity = tokenizers.Identity('tokenizer.json', '', 128256, 128000, 128001, True)
    shards.write_index(folder, identity, False, {'train': [], 'validation': []})
    return folder


def test_a_small_and_a_large_model_run_on_a_slice_and_on_gpus():
    launchers = {(model_of(words), words[0].endswith('slurm.sh')) for words in LAUNCHES}
    assert launchers == {(model, gpus) for model in ('llama3_2_1b', 'llama3_1_8b') for gpus in (False, True)}


@pytest.mark.parametrize('words', LAUNCHES, ids=lambda words: f'{words[0].split("/")[-1]} {model_of(words)}')
def test_the_run_divides_among_the_devices(words, tokens):
    run = configured(words, tokens)
    mesh = mesh_of(run)
    assert mesh.size == devices_of(words)
    check_batches(run, mesh)
    config = run.model.config
    assert config.moe.dropless and config.moe.num_experts % mesh.shape['expert'] == 0
    assert (config.remat, config.dtype, config.scan_layers, run.parameters_over_data) == (
        'full',
        'bfloat16',
        True,
        True,
    )
    assert run.surgery is not None


@pytest.mark.exhaustive
@pytest.mark.parametrize('words', LAUNCHES, ids=lambda words: f'{words[0].split("/")[-1]} {model_of(words)}')
def test_the_state_is_as_large_as_the_page_says_and_evenly_split(words, tokens):
    run = configured(words, tokens)
    mesh = mesh_of(run)
    state = make_layout(run, mesh).abstract
    size = cost.num_bytes(state)
    text = ' '.join((DOCS / 'launching.md').read_text(encoding='utf-8').split())
    sizes = dict(
        zip(('llama3_2_1b', 'llama3_1_8b'), re.search(r'(\d+) and (\d+) GB of state', text).groups(), strict=True)
    )
    assert round(size / 1e9) == int(sizes[model_of(words)])
    assert cost.bytes_per_device(state) == pytest.approx(size / mesh.size, rel=1e-3)
