"""Training of decoder-only models: decay, accumulation, optimizers, frozen parameters, and fine-tuning."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests import runs, tokens
from tests.moe.quick import jit
from tests.small import close_to_largest, llm_batch, llm_moe, small_llm, spec_of
from upcycle import configuration, partitioning
from upcycle.checkpoints import open_checkpoint
from upcycle.commands import tokenize, train
from upcycle.metrics import read_metrics
from upcycle.models.causal_lm import CausalLM
from upcycle.training.state import boxed_shapes
from upcycle.training.step import TrainState, gradient
from upcycle.transfer import transfer

ADAFACTOR = 'optimizers/adafactor.gin'


def leaves_of(run):
    reader = open_checkpoint(str(run))
    return {name: np.asarray(reader.read(name)) for name in reader.leaves()}


@pytest.mark.parametrize('files', [(), (ADAFACTOR,)])
def test_norms_biases_and_embeddings_do_not_decay(files, tmp_path):
    """Without a gradient, a step only decays."""
    more = {'QKV_BIAS': True, 'OUT_BIAS': True, 'MLP_BIAS': True, 'QK_NORM': 'head', 'NUM_LAYERS': 1}
    model, *rest = runs.FILES['llm scratch']
    run = configuration.load((model, *files, *rest), runs.bindings('llm scratch', tmp_path, 2, **more))
    boxed = boxed_shapes(run.model, tuple(sorted(run.train_data.batch_spec().items())))
    # Paths decide; leaves of one shape compile one program.
    params = jax.tree.map(lambda leaf: jnp.ones(1), partitioning.unbox(boxed))
    axes = jax.tree.map(lambda leaf: 0, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    new, _ = run.optimizer.update(zeros, run.optimizer.init(params, axes), params, 0.5, axes)
    decayed = {path for path, leaf in flatten_dict(new, sep='/').items() if np.allclose(leaf, 1 - 0.5 * 0.1)}
    kept = {path for path, leaf in flatten_dict(new, sep='/').items() if (np.asarray(leaf) == 1).all()}
    assert decayed | kept == flatten_dict(params, sep='/').keys()
    assert {path.rpartition('/')[2] for path in kept} == {'scale', 'bias', 'embedding'}
    assert {path.rpartition('/')[2] for path in decayed} == {'kernel'}


@pytest.mark.exhaustive
@pytest.mark.parametrize('moe', [None, llm_moe(groups_multiple_of=2)])
def test_accumulated_gradients_are_those_of_the_batch(moe):
    """Of packed rows, of which the microbatches have different numbers of targets."""
    model = CausalLM(small_llm(num_layers=1, moe=moe, moe_layers='none' if moe is None else 'all'))
    batch = llm_batch()
    batch['loss_weights'] = batch['loss_weights'].at[:2, 5:].set(0.0)
    params = partitioning.unbox(model.init(jax.random.key(0), spec_of(batch)))
    state = TrainState(jnp.asarray(0), params, {}, jax.random.key_data(jax.random.key(1)))
    (one, sums), (two, parts) = (
        jit(lambda state, batch, n=n: gradient(state, batch, model=model, num_microbatches=n))(state, batch)
        for n in (1, 2)
    )
    flat = flatten_dict(two, sep='/')
    for path, leaf in flatten_dict(one, sep='/').items():
        assert close_to_largest(flat[path], leaf, 1e-5), path
    assert sums.keys() == parts.keys() and float(sums['loss']) == pytest.approx(float(parts['loss']), rel=1e-6)


@pytest.mark.exhaustive
def test_adafactor_carries_its_state_over(tmp_path):
    model, *rest = runs.FILES['llm dense']
    train.run((model, ADAFACTOR, *rest), runs.bindings('llm dense', tmp_path / 'dense', 2, WARMUP_STEPS=1))
    more = {'OPTIMIZER_STATE': 'tile', 'INITIAL_CHECKPOINT_PATH': tmp_path / 'dense', 'WARMUP_STEPS': 1}
    model, *rest = runs.FILES['llm upcycle']
    state = train.run((model, ADAFACTOR, *rest), runs.bindings('llm upcycle', tmp_path / 'up', 4, **more))
    assert int(state.opt_state['count']) == 4
    moments = state.opt_state['param_states']['decoder']['layers_0']['mlp']['expert']['wo']['kernel']
    assert moments['m'].shape == (4, 128, 64) and (np.asarray(moments['m']) != 0).any()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ('names', 'pattern'),
    [
        ('routers', lambda name: '/router/' in name),
        ('experts', lambda name: '/expert/' in name),
        (
            'layers_1/self_attention/(query|key)',
            lambda name: 'layers_1' in name and ('/query/' in name or '/key/' in name),
        ),
    ],
)
def test_all_others_are_equal_bit_for_bit(names, pattern, tmp_path, dense_llm):
    """Parameters and their optimizer state, with weight decay."""
    more = {'INITIAL_CHECKPOINT_PATH': dense_llm, 'WARMUP_STEPS': 1, 'CHECKPOINT_PERIOD': 1, 'CHECKPOINT_KEEP': None}
    runs.train('llm upcycle', tmp_path / 'run', 7, **more, TRAINABLE=names)
    first, last = (leaves_of(tmp_path / 'run' / 'checkpoints' / step) for step in ('5', '7'))
    moved = {name for name, leaf in last.items() if not np.array_equal(leaf, first[name])} - {'step', 'opt_state/count'}
    trained = {name for name in last if pattern(name)}
    assert moved == trained and any(name.startswith('opt_state/') for name in moved)
    dense = leaves_of(dense_llm)
    for name in dense.keys() & (last.keys() - trained):
        if name.startswith('params/'):
            np.testing.assert_array_equal(last[name], dense[name], err_msg=name)


@pytest.mark.exhaustive
def test_an_upcycled_model_is_fine_tuned(tmp_path, dense_llm):
    """By the shared run file: from its weights, with fresh state, steps from 0 and dropout."""
    runs.train('llm upcycle', tmp_path / 'up', 6, INITIAL_CHECKPOINT_PATH=dense_llm, WARMUP_STEPS=1)
    more = {'INITIAL_CHECKPOINT_PATH': tmp_path / 'up', 'BASE_LEARNING_RATE': 1e-4, 'LOG_PERIOD': 1}
    files = (*runs.FILES['llm upcycle'][:-1], 'runs/finetune.gin')
    bindings = runs.bindings('llm upcycle', tmp_path / 'run', 2, **more)
    state = train.run(files, {name: value for name, value in bindings.items() if name != 'WARMUP_STEPS'})
    assert (int(state.step), int(state.opt_state['count'])) == (2, 2)
    first, *rest = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    before = [line for line in read_metrics(tmp_path / 'up' / 'metrics.jsonl') if line['split'] == 'validation'][-1]
    assert (first['step'], first['start_step'], first['split']) == (0, 0, 'validation')
    assert first['loss'] == pytest.approx(before['loss'], rel=1e-6)
    assert [line['learning_rate'] for line in rest if line['split'] == 'train'] == pytest.approx([1e-4, 1e-4])


@pytest.mark.exhaustive
def test_fine_tuning_on_conversations_leads_from_a_folder_to_a_folder(tmp_path, dense_llm):
    runs.train('llm upcycle', tmp_path / 'up', 6, INITIAL_CHECKPOINT_PATH=dense_llm)
    transfer(str(tmp_path / 'up'), str(tmp_path / 'moe'), 'huggingface', optimizer_state='none')
    tokens.write_tokenizer(tmp_path / 'moe', tokens.CHATML)
    (tmp_path / 'chat.jsonl').write_text((json.dumps({'messages': tokens.MESSAGES}) + '\n') * 20)
    tokenize.run(
        [str(tmp_path / 'chat.jsonl')], str(tmp_path / 'moe'), str(tmp_path / 'conversations'), chat=True, workers=1
    )
    files = ('models/from_checkpoint.gin', 'tasks/tokens.gin', 'runs/finetune_llm.gin')
    more = {'INITIAL_CHECKPOINT_PATH': tmp_path / 'moe', 'TOKENS_DIR': tmp_path / 'conversations', 'LOG_PERIOD': 10}
    more |= {'SEQUENCE_LENGTH': 64, 'BASE_LEARNING_RATE': 3e-3, 'WARMUP_STEPS': 2, 'EVAL_PERIOD': 100}
    train.run(files, runs.bindings('llm dense', tmp_path / 'run', 40, **more))
    losses = [line['loss'] for line in read_metrics(tmp_path / 'run' / 'metrics.jsonl') if line['split'] == 'train']
    assert losses[-1] < 0.5 * losses[0]
    transfer(str(tmp_path / 'run'), str(tmp_path / 'out'), 'huggingface', optimizer_state='none')
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'moe' / name).read_bytes()
    run, out = leaves_of(tmp_path / 'run'), leaves_of(tmp_path / 'out')
    assert {name for name in run if name.startswith('params/')} == out.keys() - {'step'}
    for name in out.keys() - {'step'}:
        np.testing.assert_array_equal(out[name], run[name], err_msg=name)
