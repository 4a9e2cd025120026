"""t5x's losses over 40 steps: dense with restored optimizer state, and upcycled to flaxformer's MoE."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.fixtures import fixtures_dir, requires_fixtures
from tests.small import FIXTURE_T5, fixture, fixture_batch, fixture_tree, flaxformer_moe
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.training.optimizer import Adafactor
from upcycle.training.step import TrainState, train_step

STEPS = 40
# Relative root-mean-square distance of a leaf after 40 steps between two runs of ours whose initial parameters differ by one
# unit in the last place, at random: at most 7.5e-7 (dense, three perturbations) and 3.9e-6 (MoE, two) over all leaves
# (`perturbed_run_distance` below). The bound is about ten times that.
RMS_BOUND = {'dense': 1e-5, 'moe': 3e-5}


def _case(kind):
    """Returns model, parameters, optimizer, its state (None: fresh, at step 100), and t5x's losses and final parameters."""
    dense, moe = fixture('t5x_dense_reference.npz'), fixture('flaxformer_moe_reference.npz')
    curves = fixture('t5x_learning_curves.npz')
    losses = json.loads((fixtures_dir() / 't5x_learning_curves.json').read_text())
    if kind == 'dense':
        model = EncoderDecoderModel(FIXTURE_T5, loss_normalizing_factor=None)
        states = flatten_dict(fixture_tree(dense, 'param_states/'))
        kept = unflatten_dict({path: leaf for path, leaf in states.items() if leaf.shape != (1,)})
        state = {'count': jnp.asarray(100, jnp.int32), 'param_states': kept}
        params, expected = fixture_tree(dense, 'params/'), losses['dense_loss_sum_over_256_tokens']
        return (
            model,
            params,
            Adafactor(min_dim_size_to_factor=64),
            state,
            expected,
            fixture_tree(curves, 'dense_params_after_40/'),
        )
    model = EncoderDecoderModel(flaxformer_moe())
    # T5X factors all expert leaves, even small ones.
    optimizer = Adafactor(min_dim_size_to_factor=128, expert_min_dim_size_to_factor=1)
    expected = losses['moe_num_expert_partitions=8']['loss_mean_per_token_plus_aux']
    return model, fixture_tree(moe, 'params/'), optimizer, None, expected, fixture_tree(curves, 'moe_params_after_40/')


def _run(model, params, optimizer, opt_state, num_microbatches=1):
    axes = unflatten_dict({path: int('expert' in path) for path in flatten_dict(params)})
    if opt_state is None:
        opt_state = {**optimizer.init(params, axes), 'count': jnp.asarray(100, jnp.int32)}
    curves = fixture('t5x_learning_curves.npz')
    step = jax.jit(
        functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            learning_rate=lambda _: jnp.float32(0.01),
            batch_axes=axes,
            num_microbatches=num_microbatches,
        )
    )
    state = TrainState(jnp.asarray(100), params, opt_state, jax.random.key_data(jax.random.key(0)))
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, fixture_batch(curves, f'batch_{i:02d}/'))
        losses.append(float(metrics['loss']))
    return np.array(losses), state.params


def _distances(actual, expected):
    actual, expected = flatten_dict(actual, sep='/'), flatten_dict(expected, sep='/')
    return {
        name: float(jnp.sqrt(jnp.mean(jnp.square(actual[name] - leaf)) / jnp.mean(jnp.square(leaf))))
        for name, leaf in expected.items()
    }


@requires_fixtures
@pytest.mark.parametrize('kind', ['dense', 'moe'])
def test_follows_t5x(kind):
    model, params, optimizer, state, losses, final = _case(kind)
    ours, ends = _run(model, params, optimizer, state)
    # The requirement is 1e-3; measured are 2e-7 (dense) and 3e-6 (MoE).
    np.testing.assert_allclose(ours, losses[:STEPS], rtol=3e-5)
    distances = _distances(ends, final)
    assert len(distances) > 10
    assert max(distances.values()) < RMS_BOUND[kind], sorted(distances.items(), key=lambda item: -item[1])[:3]


@pytest.mark.exhaustive
@requires_fixtures
def test_the_curve_notices_a_wrong_optimizer():
    """The bounds must be tight enough to fail with another factoring."""
    model, params, _, state, losses, _ = _case('moe')
    ours, _ = _run(model, params, Adafactor(min_dim_size_to_factor=128), state)
    assert np.max(np.abs(ours / losses[:STEPS] - 1)) > 1e-3


@requires_fixtures
@pytest.mark.exhaustive
def test_microbatches_follow_the_same_curve():
    model, params, optimizer, state, losses, _ = _case('moe')
    ours, _ = _run(model, params, optimizer, state, num_microbatches=4)
    np.testing.assert_allclose(ours, losses[:STEPS], rtol=1e-4)


def perturbed_run_distance(kind: str, seed: int) -> float:
    """Measures the distance of two runs whose parameters first differ by one unit in the last place, for RMS_BOUND."""
    model, params, optimizer, state, _, _ = _case(kind)
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: np.nextafter(x, rng.choice([-np.inf, np.inf], x.shape).astype(np.float32)), params)
    _, first = _run(model, params, optimizer, state)
    _, second = _run(model, moved, optimizer, dataclasses.replace(state) if dataclasses.is_dataclass(state) else state)
    return max(_distances(second, first).values())
