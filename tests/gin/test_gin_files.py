"""Every gin file is built and stepped twice; full sizes are stepped abstractly."""

import contextlib
import functools
import math
import pathlib
import re

import jax
import numpy as np
import PIL.Image
import pytest
from flax.traverse_util import flatten_dict

from tests import runs, vision
from tests.checkpoints import trees
from upcycle import configuration, cost, partitioning, run_config
from upcycle.commands import train
from upcycle.errors import UserError
from upcycle.metrics import read_metrics
from upcycle.surgery.operators import DENSE_OPERATORS, EXPERT_OPERATORS, Start
from upcycle.training import first_state, loop, start
from upcycle.training.first_state import from_checkpoint
from upcycle.training.state import make_layout
from upcycle.training.step import train_step

GIN = pathlib.Path(__file__).resolve().parents[2] / 'gin'
RECIPES = (
    'default_output',
    'dense_training',
    'soft_moe',
    'logit_normalization',
    'adaptive_balance',
    'loss_free_balancing',
    'mutual_information',
    'router_z_loss',
    'jitter',
    'routers_first',
    'moe_layers_only',
    'shared_experts',
    'gated_shared_expert',
    'merged',
)
RATES = ('restarted_rate', 'constant_minimum')
T5_1_0 = tuple(f't5_1_0_{size}' for size in ('small', 'base', 'large', '3b', '11b'))
FULL_SIZES = (*(f't5_1_1_{size}' for size in ('small', 'base', 'large', 'xl')), *T5_1_0)
SCANNED = {'SCAN_LAYERS': 'True'}  # as deep stacks are trained: traces one block, not 12 or 32
# Dense parameters of the published checkpoints.
LLM_COUNTS = {
    'smollm2_135m': 134_515_008,
    'qwen3_0_6b': 596_049_920,
    'llama3_2_1b': 1_235_814_400,
    'gemma3_270m': 268_098_176,
    'qwen2_5_7b': 7_615_616_512,
    'mistral_7b': 7_248_023_552,
    'llama3_1_8b': 8_030_261_248,
}
VIT_SIZES = ('ti32', 'ti16', 's32', 's16', 'b32', 'b16', 'l32', 'l16', 'h14')


def test_no_gin_file_is_left_out():
    here = {str(path.relative_to(GIN)) for path in GIN.rglob('*.gin')}
    covered = {f'models/{size}.gin' for size in (*FULL_SIZES, 't5_1_1_tiny', 't5_1_1_mini', 't5_1_1', 't5_1_0')}
    covered |= {'models/umt5_base.gin', 'moe/t5.gin'}
    covered |= {f'optimizers/{name}.gin' for name in ('adafactor', 'adamw', 'sgd')}
    covered |= {f'tasks/{task}_span_corruption.gin' for task in ('stdlib', 'text_files', 'c4')}
    images = ('mnist5k', 'optdigits', 'image_folder', 'imagenet2012', 'imagenet21k', 'cifar10', 'photographs')
    covered |= {f'tasks/{task}.gin' for task in (*images, 'synthetic_text', 'synthetic_images', 'stdlib_keyword')}
    covered |= {f'models/llm{size}.gin' for size in ('', '_tiny', '_mini')} | {
        'tasks/synthetic_tokens.gin',
        'moe/llm.gin',
    }
    covered |= {'tasks/stdlib_bytes.gin', 'tasks/tokens.gin'}  # stepped in tests/data/test_without_tensorflow.py
    covered |= {f'models/{size}.gin' for size in LLM_COUNTS}
    covered |= {'models/vit.gin', 'models/vit_mini.gin', 'moe/vit.gin', 'moe/base.gin'}
    covered |= {f'models/vit_{size}.gin' for size in VIT_SIZES}
    covered |= {f'runs/{run}.gin' for run in ('pretrain', 'continue_dense', 'upcycle', 'scratch', 'convert')}
    covered |= {'runs/quickstart.gin', 'runs/quickstart_vision.gin', 'runs/quickstart_llm.gin'}
    covered |= {f'surgery/{name}.gin' for name in (*EXPERT_OPERATORS, *DENSE_OPERATORS)} | {'runs/warm_start.gin'}
    covered |= {f'recipes/{name}.gin' for name in (*RECIPES, *RATES)}
    covered |= {'t5x/continue_upcycled.gin'}  # for T5X
    # Stepped in other tests.
    covered |= {
        f'runs/{run}.gin' for run in ('eval', 'few_shot', 'task_metrics', 'finetune', 'finetune_vit', 'finetune_llm')
    }
    covered |= {'tasks/superglue.gin', 'models/from_checkpoint.gin'}
    assert here == covered


def test_what_t5x_goes_on_with_is_our_recipe():
    """Macros that both recipes have must be equal; T5X's other macros are its own and flaxformer's."""

    def macros(file):
        lines = (GIN / file).read_text().splitlines()
        return dict(line.split(' = ', 1) for line in lines if re.match('[A-Z_]+ = ', line))

    ours, theirs = macros('moe/base.gin') | macros('moe/t5.gin'), macros('t5x/continue_upcycled.gin')
    both = {'NUM_EXPERTS', 'TRAIN_EXPERT_CAPACITY_FACTOR', 'EVAL_EXPERT_CAPACITY_FACTOR', 'GROUP_SIZE'}
    both |= {'NUM_SELECTED_EXPERTS', 'AUX_LOSS_FACTOR'}
    for name in both:
        assert float(ours[name].split('#')[0]) == float(theirs[name].split('#')[0]), name
    # T5X multiplies the gradients of experts by this number.
    assert theirs['NUM_EXPERT_PARTITIONS'] == '1'


# Decoder-only runs step AdamW, and tests/training/test_decoder_only.py Adafactor.
@pytest.mark.exhaustive
@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_optimizers_step_and_carry_their_state_over(name, tmp_path):
    small = runs.bindings('dense', tmp_path / 'dense', 2, BASE_LEARNING_RATE=0.01, **runs.ONE_LAYER)
    model, *rest = runs.FILES['dense']
    optimizer = f'optimizers/{name}.gin'
    train.run((model, optimizer, *rest), small)
    tiled = {'BASE_LEARNING_RATE': 0.01, 'OPTIMIZER_STATE': 'tile', **runs.ONE_SPARSE_LAYER}
    upcycle = runs.bindings('upcycle', tmp_path / 'up', 4, **tiled)
    model, *rest = runs.FILES['upcycle']
    upcycle['INITIAL_CHECKPOINT_PATH'] = str(tmp_path / 'dense')
    state = train.run((model, optimizer, *rest), upcycle)
    assert state.opt_state['count'] == 4
    moments = state.opt_state['param_states']['encoder']['layers_0']['mlp']['expert']['wo']['kernel']['m']
    assert moments.shape[0] == 4 and (moments != 0).any()


# Other kinds step their gin files too.
SELDOM = ('text dense', 'text upcycle', 'scratch', 'vit dense', 'vit upcycle', 'llm scratch', 'llm text upcycle')


@pytest.mark.parametrize(
    'kind', [pytest.param(kind, marks=[pytest.mark.exhaustive] if kind in SELDOM else []) for kind in runs.FILES]
)
def test_runs_step_twice(kind, tmp_path, request):
    more = {}
    if kind.endswith(('continue', 'upcycle')):
        dense = {'vit': 'dense_vit', 'llm': 'dense_llm', 'text': 'shallow'}.get(kind.split()[0], 'dense')
        more['INITIAL_CHECKPOINT_PATH'] = request.getfixturevalue(dense)
    steps = 6 if more else 2
    if kind.startswith('text'):
        more |= runs.ONE_SPARSE_LAYER if kind.endswith('upcycle') else runs.ONE_LAYER
    assert int(runs.train(kind, tmp_path / kind, steps, **more).step) == steps


def first_step(files, bindings, *, trained=True):
    """Upcycles and trains one step on a constant batch, without data, evaluation and checkpoints.

    Returns:
      The receipt of the surgery, and the state: after the step, or before it if not `trained`.
    """
    run = configuration.load(files, bindings)
    begin = start.Start.of(run)
    with partitioning.use(begin.mesh):
        sharding = partitioning.batch_sharding(begin.mesh)
        spec = run.train_data.batch_spec()
        batch = partitioning.put_batch({name: np.ones(shape, dtype) for name, (shape, dtype) in spec.items()}, sharding)
        state, receipt = from_checkpoint(begin, batch)
        if trained:
            state, metrics = loop.lower_step(run, begin.layout, sharding).compile()(state, batch)
            assert np.isfinite(metrics['loss'])
    return receipt, state


@pytest.fixture(scope='module')
def sparse(tmp_path_factory, dense):
    """Run folder of a model with three experts per layer."""
    path = tmp_path_factory.mktemp('sparse') / 'run'
    runs.train('upcycle', path, 5, INITIAL_CHECKPOINT_PATH=dense, NUM_EXPERTS=3, DIVERSITY_PERIOD=1)
    return str(path)


def test_experts_come_apart(sparse):
    lines = [line for line in read_metrics(f'{sparse}/metrics.jsonl') if line['split'] == 'diversity']
    assert [line['step'] for line in lines] == [4, 5]
    before, after = (line['experts/expert_cosine'] for line in lines)
    assert before == pytest.approx(1, abs=1e-5) and after < before
    assert 'experts/decoder/layers_1/router_cosine' in lines[0]
    assert 0 <= lines[0]['experts/token_information'] <= math.log(3)
    typical = lines[1]['experts/decoder/layers_1/typical_tokens']
    assert len(typical) == 3 and all(isinstance(text, str) and text for tokens in typical for text in tokens)


@pytest.mark.parametrize('name', EXPERT_OPERATORS)
def test_surgeries_step(name, tmp_path, dense, sparse, monkeypatch):
    # The tests of operators cover the check's results in less time.
    monkeypatch.setattr(first_state, 'check_function', lambda *_: {})
    start = {Start.DENSE: dense, Start.SEVERAL: (dense, dense), Start.MOE: sparse}
    # Grow to four experts, as in all tests, so that the step is compiled once.
    more = {'GROW_UTILITY': 'weight'} if name == 'grow' else {}
    path = start[EXPERT_OPERATORS[name].starts_from]
    bindings = runs.bindings('upcycle', tmp_path / 'run', 6, INITIAL_CHECKPOINT_PATH=path, **more)
    receipt, state = first_step((*runs.FILES['upcycle'], f'surgery/{name}.gin'), bindings)
    assert int(state.step) == (6 if path == sparse else 5)
    assert receipt['operator'] == name
    assert {row['target'] for row in receipt['plan']} >= {
        f'params/{path}' for path in flatten_dict(state.params, sep='/')
    }


@pytest.mark.parametrize(
    'file',
    [
        'recipes/soft_moe',
        *(
            pytest.param(file, marks=pytest.mark.exhaustive)
            for file in ('surgery/random', 'surgery/granular', 'recipes/shared_experts')
        ),
    ],
)
def test_a_vit_takes_them_too(file, tmp_path, dense_vit):
    bindings = runs.bindings('vit upcycle', tmp_path / 'run', 6, INITIAL_CHECKPOINT_PATH=dense_vit)
    if file.startswith('recipes/'):
        bindings['OPTIMIZER_STATE'] = 'fresh'  # the dense run has no state of a shared expert or a scale
    files = (*runs.FILES['vit upcycle'], f'{file}.gin')
    if file == 'surgery/random':
        assert configuration.load(files, bindings).surgery.operator.initializer == 'xavier_uniform'
    receipt, state = first_step(files, bindings)
    assert int(state.step) == 5
    gaps = [layer['gap'] for layer in receipt['function_check']['layers'].values()]
    # The function is unchanged if there is room for every token.
    assert gaps and (max(gaps) < 1e-5) == (file in ('surgery/granular', 'recipes/shared_experts'))


@pytest.mark.parametrize('trained', [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_growing_with_k_as_it_was_says_by_how_much_the_function_changes(trained, tmp_path, sparse):
    bindings = runs.bindings('upcycle', tmp_path / 'run', 6, INITIAL_CHECKPOINT_PATH=sparse, NUM_EXPERTS=6)
    receipt, _ = first_step((*runs.FILES['upcycle'], 'surgery/grow.gin'), bindings, trained=trained)
    layers = receipt['function_check']['layers']
    assert len(layers) == 2 and all(layer['gap'] > 1e-3 for layer in layers.values())


@pytest.mark.parametrize(
    ('name', 'sizes'),
    [
        ('depth', {'NUM_ENCODER_LAYERS': 4}),
        pytest.param('width', {'EMBED_DIM': 128, 'NUM_HEADS': 4}, marks=pytest.mark.exhaustive),
        ('average', {}),
    ],
)
def test_dense_surgeries_step(name, sizes, tmp_path, dense, sparse):
    assert name in DENSE_OPERATORS
    path = sparse if name == 'average' else dense
    bindings = runs.bindings('continue', tmp_path / 'run', 6, INITIAL_CHECKPOINT_PATH=path, **sizes)
    receipt, state = first_step((*runs.FILES['continue'], f'surgery/{name}.gin'), bindings)
    assert int(state.step) == (6 if path == sparse else 5)
    assert receipt['operator'] == name
    assert np.isfinite(receipt['function_check']['whole_model']['loss_gap'])


# The tests of routers and layers cover what they compute in less time.
@pytest.mark.parametrize('abstractly', [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize('name', RECIPES)
def test_recipes_step(name, abstractly, tmp_path):
    small = dict(runs.ONE_SPARSE_LAYER)
    if name == 'soft_moe':
        small['GROUP_SIZE'] = '32'  # length of the task's sequences
    bindings = runs.bindings('scratch', tmp_path / 'run', 2, **small)
    run = configuration.load((*runs.FILES['scratch'], f'recipes/{name}.gin'), bindings)
    plain = configuration.load(runs.FILES['scratch'], bindings)
    assert run != plain
    if abstractly:
        step_abstractly(run)
        return
    begin = start.Start.of(run)
    with partitioning.use(begin.mesh):
        layout, sharding = begin.layout, partitioning.batch_sharding(begin.mesh)
        spec = run.train_data.batch_spec()
        batch = partitioning.put_batch({name: np.ones(shape, dtype) for name, (shape, dtype) in spec.items()}, sharding)
        # A constant state needs no compiled initialisation.
        state = jax.tree.map(
            lambda leaf: jax.device_put(np.full(leaf.shape, 0.1, leaf.dtype), leaf.sharding), layout.abstract
        )
        step = int(state.step)
        state, metrics = loop.lower_step(run, layout, sharding).compile()(state, batch)
    assert int(state.step) == step + 1 and np.isfinite(metrics['loss'])


@pytest.mark.parametrize('name', ['restarted_rate', pytest.param('constant_minimum', marks=pytest.mark.exhaustive)])
def test_recipes_of_the_learning_rate_step(name, tmp_path, dense):
    bindings = runs.bindings('upcycle', tmp_path / 'run', 6, INITIAL_CHECKPOINT_PATH=dense)
    if name == 'restarted_rate':
        bindings['RESTART_WARMUP_STEPS'] = '1'
    files = (*runs.FILES['upcycle'], f'recipes/{name}.gin')
    assert configuration.load(files, bindings).learning_rate.policy != 'continue'
    _, state = first_step(files, bindings)
    assert int(state.step) == 5


def test_warm_start_steps(tmp_path, dense):
    files = (*runs.FILES['continue'][:-1], 'runs/warm_start.gin')
    bindings = runs.bindings('continue', tmp_path / 'run', 6, INITIAL_CHECKPOINT_PATH=dense)
    _, state = first_step(files, bindings)
    assert int(state.step) == 5 and int(state.opt_state['count']) == 1


def test_routers_from_hidden_states(tmp_path, dense):
    more = {'INITIAL_CHECKPOINT_PATH': dense, 'ROUTER_INIT': 'hidden', 'BATCH_SIZE': 4}
    receipt, _ = first_step(runs.FILES['upcycle'], runs.bindings('upcycle', tmp_path / 'run', 5, **more))
    # Experts are identical: for any router, a covered token gets the dense MLP's output times the sum of its weights.
    for layer in receipt['function_check']['layers'].values():
        assert layer['max_abs_difference_covered'] < 1e-5 * max(layer['dense_rms'], 1)


def test_text_files_task_steps_twice(tmp_path):
    corpus = tmp_path / 'corpus'
    corpus.mkdir()
    for i in range(20):
        (corpus / f'{i}.txt').write_text(f'This is sentence {i} of a small corpus. ' * 40)
    files = (runs.TINY, 'tasks/text_files_span_corruption.gin', 'runs/pretrain.gin')
    more = {'TRAIN_FILES': str(corpus / '*.txt')}
    state = train.run(files, runs.bindings('dense', tmp_path / 'run', 2, **more))
    assert int(state.step) == 2


VIT = 'models/vit_mini.gin'
VIT_STEPS = {
    'NUM_LAYERS': '1',
    'PATCH_SIZE': '14',
    'IMAGE_SIZE': '28',
    'BATCH_SIZE': '4',
    'EVAL_STEPS': '2',
    'TRAIN_STEPS': '2',
}


def test_mnist5k_task_steps_twice(tmp_path):
    more = {'MODEL_DIR': str(tmp_path), 'EVAL_AUGMENT_STRENGTH': '1.0'}
    state = train.run((VIT, 'tasks/mnist5k.gin', 'runs/pretrain.gin'), VIT_STEPS | more)
    assert int(state.step) == 2


def test_image_folder_task_steps_twice_and_counts_classes(tmp_path):
    for name in ('cat', 'dog', 'bird'):
        (tmp_path / 'photos' / name).mkdir(parents=True)
        for i in range(30):
            PIL.Image.new('RGB', (30, 40)).save(tmp_path / 'photos' / name / f'{i}.png')
    files = (VIT, 'tasks/image_folder.gin', 'runs/pretrain.gin')
    photos = {'TRAIN_FOLDER': str(tmp_path / 'photos'), 'NUM_CLASSES': '3', 'RESIZE_SMALL': '32'}
    more = {'MODEL_DIR': str(tmp_path / 'run'), **photos}
    with pytest.raises(UserError, match='NUM_CLASSES'):
        configuration.load(files, VIT_STEPS | more | {'NUM_CLASSES': '2'})
    assert int(train.run(files, VIT_STEPS | more).step) == 2


@pytest.mark.parametrize(
    ('task', 'splits', 'num_classes'),
    [
        ('imagenet2012', ('train', 'validation'), 1000),
        pytest.param('imagenet21k', ('full',), 21843, marks=pytest.mark.exhaustive),
        pytest.param('cifar10', ('train', 'test'), 10, marks=pytest.mark.exhaustive),
    ],
)
def test_tfds_tasks_step_twice(task, splits, num_classes, tmp_path):
    vision.store_as_tfds(task, splits, num_classes, str(tmp_path))
    more = {'MODEL_DIR': str(tmp_path / 'run'), 'TFDS_DATA_DIR': str(tmp_path), 'RANDAUGMENT_LAYERS': '2'}
    if task == 'imagenet21k':
        more |= {'TRAIN_SPLIT': 'full[10:]', 'EVAL_SPLIT': 'full[:10]'}
    if task != 'cifar10':
        more |= {'RESIZE_SMALL': '32'}
    assert int(train.run((VIT, f'tasks/{task}.gin', 'runs/pretrain.gin'), VIT_STEPS | more).step) == 2


def test_synthetic_tasks_step_twice(tmp_path):
    more = {'MODEL_DIR': str(tmp_path / 'images'), 'NUM_CLASSES': '7', 'IMAGE_CHANNELS': '1'}
    assert int(train.run((VIT, 'tasks/synthetic_images.gin', 'runs/pretrain.gin'), VIT_STEPS | more).step) == 2
    small = {'TASK_FEATURE_LENGTHS': "{'inputs': 16, 'targets': 8}", 'NUM_EMBEDDINGS': '100', 'BATCH_SIZE': '4'}
    small |= runs.ONE_LAYER
    more = {'MODEL_DIR': str(tmp_path / 'text'), 'EVAL_STEPS': '1', 'TRAIN_STEPS': '2'}
    files = (runs.TINY, 'tasks/synthetic_text.gin', 'runs/pretrain.gin')
    assert int(train.run(files, small | more).step) == 2


def test_c4_task_builds_or_says_what_to_install():
    files = (runs.TINY, 'tasks/c4_span_corruption.gin', 'runs/pretrain.gin')
    try:
        run = configuration.load(files, {'MODEL_DIR': '/nowhere', 'TRAIN_STEPS': '1'})
    except UserError as error:
        assert 'upcycle[t5]' in str(error)
    else:
        assert run.train_data.batch_spec()['encoder_input_tokens'][0] == (128, 512)


# Parameter counts computed from the sizes of T5 1.1: dense, and with 32 experts in half of the layers.
COUNTS = {
    't5_1_1_base': (247.6e6, 2.003e9),
    't5_1_1_large': (783.0e6, 7.220e9),
    't5_1_1_xl': (2.850e9, 26.255e9),
    # T5 1.0: the counts of the published arrays.
    't5_1_0_small': (60_506_624, None),
    't5_1_0_base': (222_903_552, None),
    't5_1_0_large': (737_668_096, None),
    't5_1_0_3b': (2_851_598_336, None),
    't5_1_0_11b': (11_307_321_344, None),
}


@contextlib.contextmanager
def on_one_device(run):
    """Yields the layout of a run of any size on one device."""
    mesh = partitioning.make_mesh((1, 1, 1), run.num_experts, jax.devices()[:1])
    with partitioning.use(mesh):
        yield make_layout(run, mesh)


def num_parameters(run):
    with on_one_device(run) as layout:
        return cost.num_parameters(layout.abstract.params)


def step_abstractly(run):
    """Steps a run of any size by `jax.eval_shape`; returns the parameters after the step."""
    with on_one_device(run) as layout:
        batch = {name: jax.ShapeDtypeStruct(*spec) for name, spec in run.train_data.batch_spec().items()}
        step = functools.partial(
            train_step,
            model=run.model,
            optimizer=run.optimizer,
            learning_rate=run.learning_rate.schedule(0, run.total_steps),
            batch_axes=layout.batch_axes,
        )
        state, metrics = jax.eval_shape(step, layout.abstract, batch)
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (layout.abstract, state))
    assert before == after
    assert metrics['loss'].shape == ()
    return state.params


def full_t5(size, sparse):
    files = [f'models/{size}.gin', runs.TASK, 'runs/scratch.gin' if sparse else 'runs/pretrain.gin']
    if sparse:
        files.insert(1, 'moe/t5.gin')
    lengths = "{'inputs': 512, 'targets': 114}"
    bindings = {'MODEL_DIR': '/nowhere', 'TRAIN_STEPS': '1', 'NUM_EMBEDDINGS': '32128', 'TASK_FEATURE_LENGTHS': lengths}
    bindings |= SCANNED
    return configuration.load(files, bindings)


def often(cases, *some):
    """Marks all cases of a test except some as exhaustive."""
    return [pytest.param(*case, marks=() if case in some else pytest.mark.exhaustive) for case in cases]


# Upcycled, T5 1.0 differs from T5 1.1 in the same way at all sizes, so one is enough.
T5_CASES = [(size, sparse) for size in FULL_SIZES for sparse in (False, True) if not sparse or size not in T5_1_0[1:]]


@pytest.mark.parametrize(('size', 'sparse'), often(T5_CASES, ('t5_1_1_base', True), ('t5_1_0_base', False)))
def test_full_sizes_have_their_parameters(size, sparse):
    count = num_parameters(full_t5(size, sparse))
    if expected := COUNTS.get(size, (None, None))[sparse]:
        assert count == pytest.approx(expected, rel=0 if size in T5_1_0 else 1e-3)


@pytest.mark.parametrize(('size', 'sparse'), often(T5_CASES, ('t5_1_1_small', True)))
def test_full_sizes_step_abstractly(size, sparse):
    step_abstractly(full_t5(size, sparse))


def test_umt5_has_its_parameters_and_steps():
    files = ('models/umt5_base.gin', runs.TASK, 'runs/pretrain.gin')
    bindings = {'MODEL_DIR': '/nowhere', 'TRAIN_STEPS': '1', 'NUM_EMBEDDINGS': '256384', **SCANNED}
    run = configuration.load(files, bindings)
    # T5 1.1 Base with another vocabulary and 22 more tables of position biases.
    expected = COUNTS['t5_1_1_base'][0] + 2 * (256384 - 32128) * 768 + 22 * 12 * 32
    assert cost.num_parameters(step_abstractly(run)) == pytest.approx(expected, rel=1e-3)


def test_position_biases_in_every_layer_are_upcycled_and_trained(tmp_path):
    sizes = {'vocab_size': 384, 'emb_dim': 64, 'num_heads': 2, 'head_dim': 64, 'mlp_dim': 128}
    sizes |= {'num_encoder_layers': 1, 'num_decoder_layers': 1}
    tree = trees.t5(False, state=False, position_biases='every_layer', **sizes)
    path = trees.write(tmp_path / 'dense', 'upcycle', tree)
    more = {'INITIAL_CHECKPOINT_PATH': path, 'POSITION_BIASES': 'every_layer', **runs.ONE_SPARSE_LAYER}
    bindings = runs.bindings('upcycle', tmp_path / 'run', 105, **more)
    receipt, state = first_step(runs.FILES['upcycle'], bindings)
    assert int(state.step) == 101
    for layer in receipt['function_check']['layers'].values():
        assert layer['max_abs_difference_covered'] < 1e-5 * max(layer['dense_rms'], 1)
    for stack in ('encoder', 'decoder'):
        name = f'{stack}/layers_0/relpos_bias/rel_embedding'
        trained = np.asarray(flatten_dict(state.params, sep='/')[name])
        assert (trained != tree[f'params/{name}']).any()
    with pytest.raises(UserError, match="POSITION_BIASES = 'every_layer'"):
        first_step(runs.FILES['upcycle'], bindings | {'POSITION_BIASES': 'shared'}, trained=False)


# Parameter counts with 1,000 classes, computed from the sizes: dense, and with 32 experts in the last half of the blocks.
VIT_COUNTS = {
    'b32': (88.2e6, 966.7e6),
    'b16': (86.5e6, 965.1e6),
    'l32': (306.5e6, 3.4294e9),
    'l16': (304.3e6, 3.4272e9),
}


def full_llm(size):
    files = (f'models/{size}.gin', runs.LLM_TASK, 'runs/pretrain.gin')
    return configuration.load(files, {'MODEL_DIR': '/nowhere', 'TRAIN_STEPS': '1', **SCANNED})


@pytest.mark.parametrize(('size',), often([(size,) for size in LLM_COUNTS], ('llama3_2_1b',), ('gemma3_270m',)))
def test_full_llms_have_their_parameters(size):
    assert num_parameters(full_llm(size)) == LLM_COUNTS[size]


@pytest.mark.parametrize(('size',), often([(size,) for size in LLM_COUNTS], ('gemma3_270m',)))
def test_full_llms_step_abstractly(size):
    step_abstractly(full_llm(size))


# A sparse model has dense blocks too, so only counted sizes are also built dense.
VIT_CASES = [(size, True) for size in VIT_SIZES] + [(size, False) for size in VIT_COUNTS]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    for name in ('cat', 'dog'):
        (folder / name).mkdir()
        for i in range(20):
            PIL.Image.new('RGB', (8, 8)).save(folder / name / f'{i}.png')
    return folder


def full_vit(size, sparse, photos):
    files = [f'models/vit_{size}.gin', 'tasks/image_folder.gin', 'runs/scratch.gin' if sparse else 'runs/pretrain.gin']
    if sparse:
        files.insert(1, 'moe/vit.gin')
    bindings = {'MODEL_DIR': '/nowhere', 'TRAIN_STEPS': '1', 'TRAIN_FOLDER': str(photos), 'NUM_CLASSES': '1000'}
    bindings |= {'IMAGE_SIZE': '224', 'EVAL_STEPS': '1', 'BATCH_SIZE': '8'}
    bindings |= SCANNED
    return configuration.load(files, bindings)


@pytest.mark.parametrize(('size', 'sparse'), often(VIT_CASES, ('b16', True), ('b16', False)))
def test_full_vits_have_their_parameters(size, sparse, photos):
    count = num_parameters(full_vit(size, sparse, photos))
    if size in VIT_COUNTS:
        assert count == pytest.approx(VIT_COUNTS[size][sparse], rel=1e-3)


@pytest.mark.parametrize(('size', 'sparse'), often(VIT_CASES, ('ti32', True)))
def test_full_vits_step_abstractly(size, sparse, photos):
    step_abstractly(full_vit(size, sparse, photos))


def test_upcycling_differs_from_dense_continuation_in_moe_and_surgery_only(tmp_path, dense):
    """Law 5 of the design: identical hyperparameters."""
    resolved = {}
    for kind in ('continue', 'upcycle'):
        runs.build(kind, tmp_path, 10, INITIAL_CHECKPOINT_PATH=dense)
        resolved[kind] = configuration.resolved()
    differing = {
        name
        for name in resolved['continue'].keys() | resolved['upcycle'].keys()
        if resolved['continue'].get(name) != resolved['upcycle'].get(name)
    }
    allowed = ('moe', 'surgery', 'aux_loss_factor', 'router_z_loss_factor')
    assert differing
    assert all(any(word in name for word in allowed) for name in differing), differing


def test_config_gin_builds_the_same_run(tmp_path, dense):
    run = runs.build('upcycle', tmp_path / 'run', 10, INITIAL_CHECKPOINT_PATH=dense)
    first = configuration.resolved()
    path = tmp_path / 'config.gin'
    path.write_text(run_config.as_gin(first))
    configuration.load([str(path)], {})
    assert configuration.resolved() == first
    run_config.claim(run, first)
    assert configuration.load([str(tmp_path / 'run' / 'config.gin')], {}) == run
