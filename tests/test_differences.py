"""A checkpoint that does not fit a model: what differs in the words of the gin files, and no more than fits a screen."""

import re
import shlex

import numpy as np
import pytest

from tests.checkpoints import trees
from tests.test_cli import call
from upcycle import leaf_names
from upcycle.checkpoints.native import CheckpointManager
from upcycle.errors import DifferentLeaves, UserError

SIZES = {
    'NUM_EMBEDDINGS': 384,
    'EMBED_DIM': 96,
    'NUM_HEADS': 6,
    'HEAD_DIM': 16,
    'MLP_DIM': 256,
    'NUM_ENCODER_LAYERS': 6,
    'NUM_DECODER_LAYERS': 4,
}
FIELDS = ('vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim', 'num_encoder_layers', 'num_decoder_layers')
DATA = ['--gin_file=tasks/stdlib_span_corruption.gin']
SCREEN = 24


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """A T5 of width 96, dense and with 4 experts in every other layer, with state; and a ViT."""
    folder = tmp_path_factory.mktemp('checkpoints')
    sizes = dict(zip(FIELDS, SIZES.values(), strict=True))
    return {
        'dense': trees.write(folder / 'dense', 'upcycle', trees.t5(False, state=True, **sizes)),
        'moe': trees.write(folder / 'moe', 'upcycle', trees.t5(True, state=True, **sizes)),
        'vit': trees.write(folder / 'vit.npz', 'vit_npz', trees.vit(False, state=False)),
    }


def t5_of(**sizes):
    named = [f'--gin.{name}={value}' for name, value in (SIZES | sizes).items()]
    return ['--gin_file=models/t5_1_1_tiny.gin', *named]


RUN = ['--gin.MODEL_DIR=unused', '--gin.TRAIN_STEPS=1000']
UPCYCLE = [*DATA, '--gin_file=runs/upcycle.gin', *RUN]
CONTINUE = [*DATA, '--gin_file=runs/continue_dense.gin', *RUN]
MOE = ['--gin_file=moe/t5.gin', '--gin.NUM_EXPERTS=4']

# Checkpoint, command line, what is said, bindings that would fit.
CASES = {
    'another size': (
        'dense',
        ['plan', '--gin_file=models/t5_1_1_base.gin', *MOE, *UPCYCLE],
        ['EMBED_DIM is 768 here and 96 in the checkpoint', 'NUM_ENCODER_LAYERS is 12 here and 6 in the checkpoint'],
        {name: value for name, value in SIZES.items() if name != 'NUM_EMBEDDINGS'},
    ),
    'continued dense': (
        'dense',
        ['plan', '--gin_file=models/t5_1_1_small.gin', *CONTINUE],
        ['EMBED_DIM is 512 here and 96 in the checkpoint'],
        {'EMBED_DIM': 96, 'HEAD_DIM': 16, 'MLP_DIM': 256, 'NUM_ENCODER_LAYERS': 6, 'NUM_DECODER_LAYERS': 4},
    ),
    'the width of an MLP': (
        'dense',
        ['plan', *t5_of(MLP_DIM=128), *MOE, *UPCYCLE],
        ['MLP_DIM is 128 here and 256 in the checkpoint'],
        {'MLP_DIM': 256},
    ),
    'the vocabulary': (
        'dense',
        ['plan', *t5_of(), *MOE, *UPCYCLE, '--gin.NUM_EMBEDDINGS=512'],
        ['NUM_EMBEDDINGS is 512 here and 384 in the checkpoint'],
        {'NUM_EMBEDDINGS': 384},
    ),
    'heads': (
        'dense',
        ['plan', *t5_of(NUM_HEADS=3, HEAD_DIM=32), *MOE, *UPCYCLE],
        ['NUM_HEADS is 3 here and 6', 'HEAD_DIM is 32 here and 16'],
        {'NUM_HEADS': 6, 'HEAD_DIM': 16},
    ),
    'experts': (
        'moe',
        ['plan', *t5_of(), '--gin_file=moe/t5.gin', '--gin.NUM_EXPERTS=8', *CONTINUE],
        ['NUM_EXPERTS is 8 here and 4 in the checkpoint', 'expert/wi_0/kernel needs a source of shape', '(2 of them)'],
        {'NUM_EXPERTS': 4},
    ),
    'places of experts': (
        'moe',
        ['plan', *t5_of(), *MOE, *CONTINUE, '--gin.ENCODER_MOE_LAYERS=last_half'],
        ['ENCODER_MOE_LAYERS is [3, 4, 5] here and [1, 3, 5] in the checkpoint'],
        {'ENCODER_MOE_LAYERS': [1, 3, 5]},
    ),
    'a model without a macro': (
        'dense',
        ['plan', *t5_of(), '--gin.T5Config.logits_via_embedding=True', *MOE, *UPCYCLE],
        ['T5Config.logits_via_embedding is True here and False in the checkpoint'],
        {'T5Config.logits_via_embedding': False},
    ),
    'converted': (
        'dense',
        ['convert', '--to=unused', *t5_of(EMBED_DIM=64), *MOE],
        ['EMBED_DIM is 64 here and 96 in the checkpoint'],
        {'EMBED_DIM': 96},
    ),
    'a ViT': (
        'vit',
        [
            'convert',
            '--to=unused',
            '--gin_file=models/vit_b16.gin',
            '--gin_file=moe/vit.gin',
            '--optimizer_state=fresh',
        ],
        ['NUM_LAYERS is 12 here and 3 in the checkpoint', 'PATCH_SIZE is 16 here and 4', 'encoderblock_*'],
        {
            'NUM_CLASSES': 5,
            'IMAGE_SIZE': 12,
            'PATCH_SIZE': 4,
            'EMBED_DIM': 16,
            'NUM_HEADS': 2,
            'MLP_DIM': 32,
            'NUM_LAYERS': 3,
            'POOLING': 'token',
        },
    ),
    'evaluated': (
        'dense',
        ['eval', *t5_of(MLP_DIM=128), *DATA, '--gin_file=runs/eval.gin'],
        ['MLP_DIM is 128 here and 256 in the checkpoint'],
        {'MLP_DIM': 256},
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_what_differs_comes_first_and_fits_a_screen(case, checkpoints, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, (command, *options), words, bindings = CASES[case][0], *CASES[case][1:]
    code, _, error = call([command, f'--from={checkpoints[name]}', *options], capsys)
    message = error[error.index('upcycle: ') :]
    assert code == 2 and re.search('not fit the model|not that of the model', message), message
    assert all(word in message for word in words), message
    assert message.count('\n') <= SCREEN, message
    (fits,) = re.findall('bindings that fit: (.*)', message)
    given = dict(part.removeprefix('--gin.').split('=', 1) for part in shlex.split(fits))
    for binding, value in bindings.items():
        assert given.get(binding) == str(value), (binding, given)
    # Bindings that are as they should be are not named.
    assert given.keys() == bindings.keys()
    (file,) = re.findall('all of them: (.*)', message) or [None]
    if file is None:
        assert not re.search(r'of them\)|and \d+ (more|leaves)', message), message
    else:
        with open(file, encoding='utf-8') as listing:
            lines = listing.read().splitlines()
        assert f'({len(lines) - 1} leaves)' in lines[0] and f'({len(lines) - 1} leaves)' in message


@pytest.mark.parametrize(
    ('name', 'options', 'said'),
    [
        ('moe', CONTINUE, 'it has experts and the model has none: include its moe/ file'),
        (
            'dense',
            [*MOE, *CONTINUE],
            'the model has experts and it has none: use runs/upcycle.gin, or remove the moe/ file',
        ),
    ],
)
def test_only_one_of_them_has_experts(name, options, said, checkpoints, capsys):
    code, _, error = call(['plan', f'--from={checkpoints[name]}', *t5_of(), *options], capsys)
    assert code == 2 and said in error.splitlines()[0] and error.count('\n') <= SCREEN, error


def test_the_bindings_make_it_fit(checkpoints, capsys):
    wrong = ['plan', f'--from={checkpoints["dense"]}', '--gin_file=models/t5_1_1_base.gin', *MOE, *UPCYCLE]
    code, _, error = call(wrong, capsys)
    (fits,) = re.findall('bindings that fit: (.*)', error)
    assert code == 2 and call([*wrong, *shlex.split(fits)], capsys)[0] == 0


def test_a_checkpoint_that_is_not_whole(tmp_path, capsys):
    tree = trees.t5(False, state=False, num_encoder_layers=12, num_decoder_layers=12)
    broken = {name: value[..., :5] if '/mlp/wo/' in name else value for name, value in tree.items()}
    broken = {name: value for name, value in broken.items() if 'attention/out/' not in name}
    code, _, error = call(
        ['import', f'--from={trees.write(tmp_path / "in", "upcycle", broken)}', '--to=unused'], capsys
    )
    assert code == 2 and 'is not a complete t5 (' in error and error.count('\n') <= SCREEN, error
    assert re.search(r'params/encoder/layers_\*/attention/out/kernel \(12, 16\) is missing \(12 of them\)', error), (
        error
    )
    assert 'all of them: ' in error


def test_a_step_of_another_model(tmp_path):
    def state(layers):
        return {'step': np.int32(1), 'params': {'x': {f'layers_{i}': {'w': np.ones(2, 'f')} for i in range(layers)}}}

    import jax

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(40), {}, {})
        manager.wait()
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state(2))
        with pytest.raises(UserError, match=r'only in the checkpoint: params/x/layers_\*/w .* \(38 of them\)') as error:
            manager.restore(1, wanted)
    assert len(error.value.problems) == 38


def test_lines_of_alike_layers_are_one():
    lines = [f'params/encoder/layers_{i}/mlp/wi_0/kernel is (3, {4 + i % 2})' for i in range(12)]
    assert leaf_names.grouped(lines) == [
        f'params/encoder/layers_*/mlp/wi_0/kernel is (3, {n}) (6 of them)' for n in (4, 5)
    ]
    assert leaf_names.grouped(lines, 1)[1] == 'and 6 more' and leaf_names.grouped(lines[:1]) == lines[:1]
    assert (
        leaf_names.pattern('encoder.block.10.layer.0.SelfAttention.q.weight')
        == 'encoder.block.*.layer.0.SelfAttention.q.weight'
    )
    assert leaf_names.pattern('Transformer/encoderblock_3/MlpBlock_0/Dense_1/bias, 0.5 in v1') == (
        'Transformer/encoderblock_*/MlpBlock_0/Dense_1/bias, 0.5 in v1'
    )
    assert str(DifferentLeaves('It differs', ['a/b is c'])) == 'It differs (1 leaf):\n  a/b is c'


def test_what_shapes_do_not_say_and_sizes_at_once(tmp_path, capsys):
    """A Hugging Face folder says its heads; the sizes that differ are in the same message."""
    sizes = dict(zip(FIELDS, SIZES.values(), strict=True))
    path = trees.write(tmp_path / 'x', 'huggingface', trees.t5(False, state=False, **sizes))
    bindings = ['--gin.OPTIMIZER_STATE=fresh']
    command = ['plan', f'--from={path}', '--gin_file=models/t5_1_1_base.gin', *MOE, *UPCYCLE]
    code, _, error = call([*command, *bindings], capsys)
    assert code == 2 and len(error.splitlines()) <= SCREEN
    assert 'num_heads = 6, and the model has 12' in error and 'EMBED_DIM is 768 here and 96 in the checkpoint' in error
    bindings += shlex.split(re.search('bindings that fit: (.*)', error)[1])
    assert call([*command, *bindings], capsys)[0] == 0


def test_a_backbone_has_no_number_of_classes(tmp_path, capsys):
    tree = {name: value for name, value in trees.vit(False, state=False).items() if '/head/' not in name}
    path = trees.write(tmp_path / 'vit.npz', 'vit_npz', tree)
    files = ['--gin_file=models/vit_mini.gin', '--gin_file=moe/vit.gin']
    code, _, error = call(
        ['convert', f'--from={path}', f'--to={tmp_path / "y"}', '--optimizer_state=none', *files], capsys
    )
    assert code == 2 and 'NUM_LAYERS is 4 here and 3 in the checkpoint' in error and 'NUM_CLASSES' not in error, error
