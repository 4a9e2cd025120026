"""Training a subset of the parameters."""

import functools

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.moe import one_layer
from tests.moe.one_layer import OneLayer
from upcycle.errors import UserError
from upcycle.moe.config import MoEConfig
from upcycle.training.optimizer import Adafactor
from upcycle.training.trainable import Trainable

MODEL = OneLayer(MoEConfig(4, router='top_k'))
OPTIMIZER = Adafactor(beta1=0.9, weight_decay_rate=0.1, weight_decay_names='kernel', clip_global_norm=1.0)


@functools.cache
def start():
    return one_layer.start(MODEL, OPTIMIZER, step=10)


def moved(trainable, steps=2):
    """Returns the parameters that change, and those whose optimizer state changes."""
    state = start()
    frozen = trainable.frozen(state.params, MODEL.moe_layers(), start_step=10)
    new, metrics = one_layer.train(MODEL, OPTIMIZER, state, steps, frozen=frozen)
    params, states = (
        {name for name, leaf in flatten_dict(after, sep='/').items() if not np.array_equal(leaf, flat[name])}
        for after, flat in (
            (new.params, flatten_dict(state.params, sep='/')),
            (new.opt_state['param_states'], flatten_dict(state.opt_state['param_states'], sep='/')),
        )
    )
    return params, {name.rpartition('/')[0] for name in states}, metrics


@functools.cache
def everything():
    return moved(Trainable())


@pytest.mark.parametrize(
    ('names', 'pattern'),
    [
        ('routers', lambda name: '/router/' in name),
        ('experts', lambda name: '/expert/' in name),
        ('moe_layers', lambda name: '/mlp/' in name),
        ('norm', lambda name: 'norm' in name),
    ],
)
def test_only_the_named_parameters_and_their_states_move(names, pattern):
    all_params, _, free = everything()
    params, states, metrics = moved(Trainable(names))
    assert params == {name for name in all_params if pattern(name)}
    assert states == {name for name in all_params if pattern(name)}
    assert 0 < metrics['gradient_norm'] < free['gradient_norm']


def test_for_some_steps_only():
    trainable = Trainable('routers', steps=1)
    assert all('/router/' in name for name in moved(trainable, steps=1)[0])
    assert moved(trainable, steps=2)[0] == everything()[0]


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Trainable('('), "TRAINABLE = '\\(' is not a regular expression"),
        (lambda: Trainable(steps=3), "no effect with TRAINABLE = 'all'"),
        (lambda: Trainable('adapter').frozen(start().params, (), 0), "TRAINABLE = 'adapter' matches no parameter"),
        (lambda: Trainable('moe_layers').frozen(start().params, (), 0), 'nothing would be trained'),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
