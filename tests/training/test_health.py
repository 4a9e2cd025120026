"""Steps that are not finite, loss spikes, saturated routers, and what a run does then."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from tests.small import image_batch, random_batch, small_t5, small_vit
from tests.training.test_loop import killed_at, leaves_of, lines_of
from upcycle import configuration, run_config
from upcycle.errors import UserError
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.image_classifier import ImageClassifier
from upcycle.training import diagnosis, health, loop
from upcycle.training.diagnosis import diagnose
from upcycle.training.health import Health, Limits, NotFiniteError
from upcycle.training.start import Start
from upcycle.training.step import TrainState
from upcycle.training.trainable import NOTHING


class Poisoned:
    """A data source with a feature multiplied by `value` in some batches."""

    def __init__(self, data, feature, value, batches):
        self._data, self._feature, self._value, self._batches = data, feature, value, batches

    def __getattr__(self, name):
        return getattr(self._data, name)

    def batches(self, start=0, **hosts):
        for number, batch in enumerate(self._data.batches(start, **hosts), start):
            if number in self._batches:
                batch[self._feature] = batch[self._feature] * np.float32(self._value)
            yield batch


class Without(Poisoned):
    """A data source without these batches; can be read only from the start."""

    def batches(self, start=0, **hosts):
        assert start == 0
        for number, batch in enumerate(self._data.batches(0, **hosts)):
            if number not in self._batches:
                yield batch


def train(kind, model_dir, steps, poisoned=None, **more):
    run = runs.build(kind, model_dir, steps, **more)
    if poisoned is not None:
        run = dataclasses.replace(run, train_data=poisoned(run.train_data))
    return loop.train(Start.of(run))


def assert_same_run(one, other):
    assert lines_of(one) == lines_of(other)
    ours, theirs = leaves_of(one), leaves_of(other)
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


SKIPPED = {'MAX_SKIPPED_STEPS': 3, 'LOG_PERIOD': 2, 'EVAL_PERIOD': 100}


def not_finite(data):
    """Batches of steps 4 to 6 are not finite: before and after the checkpoint at step 4."""
    return Poisoned(data, 'image', math.nan, {3, 4, 5})


@pytest.fixture(scope='module')
def skipping(tmp_path_factory):
    """Eight steps of a sparse ViT with all checkpoints."""
    path = tmp_path_factory.mktemp('skipping')
    train('vit scratch', path, 8, not_finite, **SKIPPED, CHECKPOINT_KEEP=None)
    return path


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(skipping):
    before, after, later = (leaves_of(skipping / 'checkpoints' / step) for step in ('4', '6', '8'))
    assert (before.pop('step'), after.pop('step')) == (4, 6)
    for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf, err_msg=name)
    # Step 4 was skipped too; the optimizer's count says how many steps were not.
    assert (before['opt_state/count'], later['opt_state/count']) == (3, 5)
    assert any((later[name] != leaf).any() for name, leaf in after.items() if name.startswith('params/'))
    lines = {line['step']: line for line in lines_of(skipping) if line['split'] == 'train'}
    assert [lines[step]['skipped_steps'] for step in (2, 4, 6, 8)] == [0, 1, 3, 3]
    # Means cover the steps that were not skipped, of which there are none between 4 and 6.
    assert [step for step in lines if 'loss' not in lines[step]] == [6]
    assert all(math.isfinite(lines[step]['loss']) for step in (2, 4, 8))


@pytest.mark.parametrize('step', [4, 6])
def test_counts_survive_a_restart(step, skipping, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train('vit scratch', tmp_path, 8, not_finite, **SKIPPED)
    train('vit scratch', tmp_path, 8, not_finite, **SKIPPED)
    assert_same_run(tmp_path, skipping)


def test_more_skipped_steps_than_allowed_stop_with_a_diagnosis_and_a_higher_limit_continues(skipping, tmp_path, capsys):
    bounded = SKIPPED | {'MAX_SKIPPED_STEPS': 2}
    # The second start is at the checkpoint between the counted steps.
    for _ in range(2):
        with pytest.raises(UserError) as stop:
            train('vit scratch', tmp_path, 8, not_finite, **bounded)
        for part in (
            'steps 4 to 6 were not finite',
            'MAX_SKIPPED_STEPS = 2',
            'at step 4, the batch holds NaN or infinity in image',
            'step 3 was the last good one',
            'is of step 4: correct the data',
        ):
            assert part in str(stop.value)
    assert capsys.readouterr().err.count('step 4: loss nan, gradient norm nan: not finite') == 1
    train('vit scratch', tmp_path, 8, not_finite, **SKIPPED)
    assert_same_run(tmp_path, skipping)


class Formula:
    """A model whose loss is a formula of its parameters."""

    def __init__(self, formula):
        self._formula = formula

    def init(self, rng, batch_spec):
        return {f'layers_{i}': {'w': jnp.ones(())} for i in range(3)}

    def loss_normalizer(self, batch):
        return jnp.ones(())

    def forward(self, params, batch, rng, *, training, num_microbatches):
        loss = self._formula(params)
        one = jnp.ones(())
        return {'loss': loss, 'z_loss': one, 'correct': one, 'weight': one}, jnp.zeros(()), {}


@pytest.mark.parametrize(
    ('formula', 'params', 'said'),
    [
        # Infinite slope at 0, in the layer nearest to the loss and in those before.
        (lambda layers: jnp.sqrt(layers[0] * layers[1]) + layers[2], (0.0, 0.0, 1.0), '2 of 3 .* params/layers_1/w$'),
        (
            lambda layers: layers[1] + 1e30 * layers[0],
            (1.0, 1.0, 1.0),
            r'overflows, .* is 1e\+30, in params/layers_0/w$',
        ),
        (
            lambda layers: jnp.sqrt(-sum(layers)),
            (1.0, 7.0, 1.0),
            'loss is nan and no leaf .* is 7, in params/layers_1/w',
        ),
        (lambda layers: jnp.log(-sum(layers)), (1.0, 7.0, 1.0), 'loss is nan and every leaf .* finite, .* is 7, in'),
        (lambda layers: sum(layers), (1.0, math.inf, 1.0), 'parameters hold NaN or infinity in params/layers_1/w$'),
    ],
)
def test_a_diagnosis_names_the_leaf(formula, params, said):
    params = {f'layers_{i}': {'w': jnp.float32(value)} for i, value in enumerate(params)}
    state = TrainState(jnp.int32(0), params, {}, jax.random.key_data(jax.random.key(0)))
    model = Formula(lambda tree: formula([tree[f'layers_{i}']['w'] for i in range(3)]))
    text = diagnose(state, {'tokens': jnp.zeros(2, jnp.int32)}, model=model, num_microbatches=1, frozen=NOTHING)
    assert re.search(said, text), text


@pytest.mark.parametrize('family', ['t5', 'vit'])
def test_the_leaf_nearest_to_the_loss(family):
    """The head is nearest to the loss, then final norm, decoder layers, encoder, embedding."""
    if family == 't5':
        sizes = {'emb_dim': 16, 'mlp_dim': 16, 'head_dim': 8, 'vocab_size': 32}
        model, batch = EncoderDecoderModel(small_t5(**sizes, num_decoder_layers=11)), random_batch(32)
        ends = [
            'token_embedder/',
            'encoder/layers_1/',
            'encoder/encoder_norm/',
            'decoder/layers_2/',
            'decoder/layers_10/',
        ]
        ends += ['decoder/decoder_norm/', 'decoder/logits_dense/']
    else:
        config = small_vit(emb_dim=16, mlp_dim=16, num_heads=2, num_layers=11, pooling='map')
        model, batch = ImageClassifier(config), image_batch(config)
        ends = ['embedding/', 'Transformer/encoderblock_2/', 'Transformer/encoderblock_10/', 'Transformer/encoder_norm']
        ends += ['MAPHead_0/', 'head/']
    order = diagnosis._forward_order(model, batch)
    places = [max(i for i, name in enumerate(order) if name.startswith(f'params/{end}')) for end in ends]
    assert places == sorted(places) and places[-1] == len(order) - 1


def test_a_diagnosis_says_of_which_step_its_parameters_are():
    """Steps under way can be taken before the steps that are not finite are noticed."""
    window = loop.Window(Health(Limits(max_skipped_steps=0)))

    def add(skipped):
        window.add({'loss': math.nan if skipped else 1.0, 'gradient_norm': 1.0, 'skipped': skipped})

    add(False)
    add(True)
    add(False)
    with pytest.raises(NotFiniteError) as found:
        add(True)
    assert (found.value.first, window.taken_under_way()) == (2, 3)
    state = TrainState(jnp.int32(1), {'w': jnp.float32(math.nan)}, {}, jax.random.key_data(jax.random.key(0)))
    model = Formula(lambda params: params['w'])
    batch = {'tokens': jnp.zeros(2, jnp.int32)}
    text = diagnose(state, batch, model=model, num_microbatches=1, frozen=NOTHING, when='after step 3')
    assert text == 'after step 3, parameters hold NaN or infinity in params/w'


LEAPING = {
    'SPIKE_WINDOW': 2,
    'CHECKPOINT_PERIOD': 4,
    'EVAL_PERIOD': 3,
    'LOG_PERIOD': 1,
}


def leaps(*batches):
    return lambda data: Poisoned(light(data), 'weights', 100, set(batches))


def without(*batches):
    return lambda data: Without(light(data), None, None, set(batches))


def light(data):
    """Images with a total weight below 1, by which their loss is divided: batches of larger weight are spikes."""
    return Poisoned(data, 'weights', 0.01, range(1000))


def test_a_rollback_skips_the_batches_of_a_spike(tmp_path, monkeypatch, capsys):
    """Two rollbacks to the checkpoint of step 4 give the run that never saw the batches, wherever it is killed."""
    more = LEAPING | {'MAX_ROLLBACKS': 2}
    # Step 6 is a spike, and the batches of steps 5 and 6 are skipped; then step 5, on the next batch, is a spike.
    train('vit dense', tmp_path / 'run', 8, leaps(5, 6), **more)
    train('vit dense', tmp_path / 'clean', 8, without(4, 5, 6), **more)
    run, clean = leaves_of(tmp_path / 'run'), leaves_of(tmp_path / 'clean')
    for name, leaf in clean.items():
        np.testing.assert_array_equal(run[name], leaf, err_msg=name)
    lines, clean_lines = lines_of(tmp_path / 'run'), lines_of(tmp_path / 'clean')
    assert [(line['step'], line['split']) for line in lines] == [(line['step'], line['split']) for line in clean_lines]
    for line, other in zip(lines, clean_lines, strict=True):
        assert line['loss'] == other['loss']
    last = [line for line in lines if line['split'] == 'train'][-1]
    assert {name: last[name] for name in health.Health.COUNTS} == {
        'skipped_steps': 0,
        'loss_spikes': 2,
        'rollbacks': 2,
        'batches_left_out': 3,
    }
    # The cost includes the skipped steps.
    assert last['flops'] == pytest.approx(clean_lines[-1]['flops'] * 11 / 8)
    assert 'step 4: rolled back to this step; the next 2 batches are skipped' in capsys.readouterr().err
    with monkeypatch.context() as patch:
        killed_at(patch, 11)  # at step 6, after both
        with pytest.raises(KeyboardInterrupt):
            train('vit dense', tmp_path / 'cut', 8, leaps(5, 6), **more)
    train('vit dense', tmp_path / 'cut', 8, leaps(5, 6), **more)
    assert_same_run(tmp_path / 'cut', tmp_path / 'run')


def test_before_its_first_checkpoint_a_run_goes_back_to_its_start(tmp_path, dense_vit):
    more = LEAPING | {'MAX_ROLLBACKS': 1, 'INITIAL_CHECKPOINT_PATH': dense_vit}
    train('vit continue', tmp_path / 'run', 8, leaps(6), **more)
    lines = lines_of(tmp_path / 'run')
    assert [line['step'] for line in lines if line['split'] == 'train'] == [5, 6, 7, 8]
    # The first step that is kept is the fourth one taken.
    assert lines[-1]['flops'] == pytest.approx(lines[1]['flops'] * 7 / 4)
    assert [line['batches_left_out'] for line in lines if line['split'] == 'train'] == [3] * 4
    assert [line['step'] for line in lines if line['split'] == 'validation'] == [4, 6, 8]


def test_without_rollbacks_a_spike_is_counted_once():
    watch = health.Health(health.Limits(spike_window=4))
    for loss in (2.0, 2.02, 1.98, 2.0, 2.1, 2.5, 2.6, 2.0, 9.0):
        assert watch.see({'loss': loss, 'skipped': 0.0})
    # 2.1 is within a tenth; 2.6 belongs to the spike of 2.5; after that the losses vary widely.
    assert watch.counts['loss_spikes'] == 2
    assert len(watch.values['losses']) == 4


@pytest.mark.parametrize(
    ('before', 'loss', 'leaps'),
    [
        ([2.0] * 9, 2.19, False),
        ([2.0] * 9, 2.21, True),
        ([1.5, 2.5] * 5, 9.4, False),
        ([1.5, 2.5] * 5, 9.5, True),
        ([2.0] * 9, 0.1, False),
    ],
)
def test_definition_of_a_spike(before, loss, leaps):
    assert health.is_spike(loss, before, 10.0) == leaps


def test_routers_and_experts_that_stop_working_are_named_once(capsys):
    watch = health.Health(health.Limits())
    well = {
        'experts/router_entropy': 1.0,
        'experts/encoder/layers_1/load': [0.25] * 4,
        'experts/encoder/layers_1/router_entropy': 1.2,
        'experts/encoder/layers_1/router_z_loss': 4.0,
    }
    starved = well | {'experts/encoder/layers_1/load': [0.5, 0.001, 0.498, 0.001]}
    saturated = well | {'experts/encoder/layers_1/router_entropy': 0.001}
    large = well | {'experts/encoder/layers_1/router_z_loss': 60.0**2}
    counts = [
        tuple(watch.look_at_routing(means).values())
        for means in (well, starved, starved, well, saturated, starved, large)
    ]
    assert counts == [(0, 0), (2, 0), (2, 0), (0, 0), (0, 1), (2, 0), (0, 1)]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 4
    for line, parts in zip(
        err,
        (
            ('experts/encoder/layers_1/load: experts 1, 3', 'AUX_LOSS_FACTOR'),
            ('experts/encoder/layers_1/router_entropy is 0.001 nats', 'ROUTER_Z_LOSS_FACTOR'),
            ('experts/encoder/layers_1/load',),
            ('experts/encoder/layers_1/router_z_loss is 3.6e+03, so logits are about 60',),
        ),
        strict=True,
    ):
        assert all(part in line for part in parts), line
    assert watch.look_at_routing({'loss': 1.0}) == {}


def test_a_real_router_saturates_and_leaves_have_norms(tmp_path, capsys):
    train('vit scratch', tmp_path, 3, ROUTER_INIT_STDDEV=1000, LEAF_GRADIENT_NORMS=True, EVAL_PERIOD=100)
    lines = [line for line in lines_of(tmp_path) if line['split'] == 'train']
    assert [line['experts/saturated_routers'] for line in lines] == [1, 1, 1]
    err = capsys.readouterr().err
    assert err.count('warning: ') == 1
    assert 'step 1: experts/Transformer/encoderblock_1/router_entropy' in err
    norms = {name: value for name, value in lines[-1].items() if name.startswith('gradient_norm/')}
    assert {name.replace('gradient_norm/', 'params/') for name in norms} == {
        name for name in leaves_of(tmp_path) if name.startswith('params/')
    }
    assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(lines[-1]['gradient_norm'], rel=1e-5)


def test_limits_may_change_on_resuming(tmp_path):
    more = {'MAX_ROLLBACKS': 2, 'MAX_SKIPPED_STEPS': 0, 'LEAF_GRADIENT_NORMS': True}
    for changed in ({}, more):
        run = runs.build('dense', tmp_path, 4, **changed)
        run_config.claim(run, configuration.resolved())
    # A folder of a version that had no limits.
    config = tmp_path / 'config.gin'
    lines = config.read_text().splitlines(keepends=True)
    old = [line for line in lines if 'health' not in line and 'leaf_gradient_norms' not in line]
    assert len(old) < len(lines)
    config.write_text(''.join(old))
    run_config.claim(run, configuration.resolved())


def test_parameters_unknown_to_an_older_version_had_their_defaults(tmp_path):
    run = runs.build('dense', tmp_path, 4)
    run_config.claim(run, configuration.resolved())
    config = tmp_path / 'config.gin'
    lines = config.read_text().splitlines(keepends=True)
    old = [line for line in lines if 'Run.dense_step = None' not in line]
    assert len(old) == len(lines) - 1
    config.write_text(''.join(old))
    run_config.claim(run, configuration.resolved(), write=False)
    run = runs.build('dense', tmp_path, 4, DENSE_STEP=3)
    with pytest.raises(UserError, match=r'holds another run, in which .*dense_step is None and not 3'):
        run_config.claim(run, configuration.resolved())


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'max_skipped_steps': -1}, 'MAX_SKIPPED_STEPS = -1 must be'),
        ({'spike_window': 1}, 'SPIKE_WINDOW = 1 must be'),
        ({'max_rollbacks': True}, 'MAX_ROLLBACKS = True must be'),
        ({'spike_deviations': 0}, 'SPIKE_DEVIATIONS = 0 must be'),
        ({'spike_deviations': None, 'max_rollbacks': 1}, 'MAX_ROLLBACKS = 1 needs SPIKE_DEVIATIONS'),
    ],
)
def test_bounds(settings, message):
    with pytest.raises(UserError, match=message):
        health.Limits(**settings)
