"""Operators on one MLP: a gated one without biases, as in T5, a plain one with biases, as in ViT, and a gated one with biases."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from upcycle.errors import UserError
from upcycle.surgery.make import Maker
from upcycle.surgery.operators import EXPERT_OPERATORS, Start
from upcycle.surgery.operators.dense import Copy, Drop, Noise, Random
from upcycle.surgery.plan import Action, Plan, Row, Surgery

D, F, E = 6, 40, 4
IN, OUT = ('expert', 'mlp_embed', 'expert_mlp'), ('expert', 'expert_mlp', 'mlp_embed')
INNER_BIAS, OUTER_BIAS = ('expert', 'expert_mlp'), ('expert', 'mlp_embed')
# Leaves of an MLP: shape, and logical axes with the expert axis first.
MLPS = {
    't5': {'wi_0/kernel': ((D, F), IN), 'wi_1/kernel': ((D, F), IN), 'wo/kernel': ((F, D), OUT)},
    'vit': {
        'Dense_0/kernel': ((D, F), IN),
        'Dense_0/bias': ((F,), INNER_BIAS),
        'Dense_1/kernel': ((F, D), OUT),
        'Dense_1/bias': ((D,), OUTER_BIAS),
    },
    'gated with biases': {
        'wi_0/kernel': ((D, F), IN),
        'wi_0/bias': ((F,), INNER_BIAS),
        'wi_1/kernel': ((D, F), IN),
        'wi_1/bias': ((F,), INNER_BIAS),
        'wo/kernel': ((F, D), OUT),
        'wo/bias': ((D,), OUTER_BIAS),
    },
}


def rows_of(family, operator, path='params/encoder/layers_1/mlp', dtype=jnp.float32):
    return [
        Row(
            f'{path}/expert/{name}',
            (f'{path}/{name}',) if operator.reads else (),
            Action.EXPERTS,
            (E, *shape),
            dtype,
            axes,
        )
        for name, (shape, axes) in MLPS[family].items()
    ]


def mlp_of(family, path='params/encoder/layers_1/mlp', seed=0):
    rng = np.random.default_rng(seed)
    # Means and deviations differ between leaves.
    return {
        f'{path}/{name}': (0.5 * i + (1 + i) * rng.standard_normal(shape)).astype(np.float32)
        for i, (name, (shape, _)) in enumerate(MLPS[family].items())
    }


def make_expert(operator, rows, sources, index, seed=0):
    """One expert's leaves, by target."""
    plan = Plan(tuple(rows), {}, Surgery(operator=operator, seed=seed))
    maker = Maker(plan, lambda name, sharding: sources[name], new={})
    return {row.target: np.asarray(maker.expert(row, index)) for row in rows}


def experts(family, operator, seed=0, **more):
    """The leaves of every expert and of the dense MLP, by name within the MLP."""
    rows, dense = rows_of(family, operator, **more), mlp_of(family)
    experts = [make_expert(operator, rows, dense, index, seed) for index in range(E)]
    prefix = 'params/encoder/layers_1/mlp/'
    return (
        [{name.removeprefix(prefix + 'expert/'): np.asarray(leaf) for name, leaf in e.items()} for e in experts],
        {name.removeprefix(prefix): leaf for name, leaf in dense.items()},
    )


def equal(expert, dense):
    return {name: np.array_equal(leaf, dense[name]) for name, leaf in expert.items()}


@pytest.mark.parametrize(
    ('family', 'operator'),
    [
        *(('vit', operator) for operator in (Copy(), Noise(stddev=0.0), Noise(fraction=0.0))),
        *(('vit', operator) for operator in (Drop(ratio=0.0), Random(copied=E))),
        ('gated with biases', Copy()),
        ('t5', Copy()),
        ('t5', Noise(stddev=0.0)),
        # T5 kernels are treated like ViT kernels.
        pytest.param('t5', Noise(fraction=0.0), marks=pytest.mark.exhaustive),
        pytest.param('t5', Drop(ratio=0.0), marks=pytest.mark.exhaustive),
        pytest.param('t5', Random(copied=E), marks=pytest.mark.exhaustive),
    ],
)
def test_limits_that_are_copies(family, operator):
    made, dense = experts(family, operator)
    for expert in made:
        assert all(equal(expert, dense).values())


@pytest.mark.parametrize('family', MLPS)
@pytest.mark.parametrize('operator', [Noise(), Drop(), Random()])
def test_experts_differ_and_depend_on_the_seed_and_the_name_alone(family, operator):
    made, _ = experts(family, operator)
    again, _ = experts(family, operator)
    other, _ = experts(family, operator, seed=1)
    random = [name for name, (shape, _) in MLPS[family].items() if len(shape) == 2]
    for name in random:
        assert len({expert[name].tobytes() for expert in made}) == E
        for e in range(E):
            np.testing.assert_array_equal(made[e][name], again[e][name])
            assert not np.array_equal(made[e][name], other[e][name])
    elsewhere = rows_of(family, operator, path='params/decoder/layers_1/mlp')
    moved = make_expert(operator, elsewhere, mlp_of(family, path='params/decoder/layers_1/mlp'), 0)
    for name in random:
        assert not np.array_equal(moved[f'params/decoder/layers_1/mlp/expert/{name}'], made[0][name])


def test_noise_has_its_deviation_on_its_fraction():
    made, dense = experts('t5', Noise(stddev=0.1, fraction=0.25))
    noise = np.concatenate([(expert[name] - dense[name]).ravel() for expert in made for name in dense])
    assert np.mean(noise != 0) == pytest.approx(0.25, abs=0.03)
    assert np.std(noise[noise != 0]) == pytest.approx(0.1, rel=0.1)


def test_noise_on_neurons_takes_others_in_each_matrix():
    made, dense = experts('vit', Noise(fraction=0.5, on='neurons'))
    for expert in made:
        masks = dropped(expert, dense, 'vit')
        assert all(which.sum() == F // 2 for which in masks.values())
        assert len({tuple(which) for which in masks.values()}) == 3
        np.testing.assert_array_equal(expert['Dense_1/bias'], dense['Dense_1/bias'])
    with pytest.raises(UserError, match="NOISE_ON = 'rows' is not one of weights, neurons"):
        Noise(on='rows')


def dropped(expert, dense, family):
    """For each leaf with an F axis, a mask of the neurons that differ from the dense MLP."""
    masks = {}
    for name, (shape, axes) in MLPS[family].items():
        if 'expert_mlp' in axes:
            axis = axes.index('expert_mlp') - 1
            changed = np.moveaxis(expert[name] != dense[name], axis, 0).reshape(shape[axis], -1)
            assert (changed.all(axis=1) == changed.any(axis=1)).all()  # all entries of a neuron, or none
            masks[name] = changed[:, 0]
    return masks


@pytest.mark.parametrize(
    ('family', 'ratio'),
    [
        ('t5', 0.5),
        ('t5', 1.0),
        *(('vit', ratio) for ratio in (0.1, 0.5, 0.99)),
        pytest.param('t5', 0.1, marks=pytest.mark.exhaustive),
        pytest.param('t5', 0.99, marks=pytest.mark.exhaustive),
        pytest.param('vit', 1.0, marks=pytest.mark.exhaustive),
    ],
)
def test_drop_reinitialises_whole_neurons(family, ratio):
    made, dense = experts(family, Drop(ratio=ratio))
    sets = []
    for expert in made:
        first, *others = dropped(expert, dense, family).values()
        assert first.sum() == int(ratio * F)
        for other in others:
            np.testing.assert_array_equal(first, other)
        sets.append(tuple(first))
        if family == 'vit':
            np.testing.assert_array_equal(expert['Dense_1/bias'], dense['Dense_1/bias'])
    assert len(set(sets)) == (1 if ratio == 1 else E)


def test_drop_per_matrix_draws_for_each():
    made, dense = experts('t5', Drop(indices='per_matrix'))
    for expert in made:
        masks = dropped(expert, dense, 't5')
        assert len({tuple(which) for which in masks.values()}) == 3
        assert all(which.sum() == F // 2 for which in masks.values())


@pytest.mark.parametrize('ratio', [0.05, 1.0])
@pytest.mark.parametrize(
    ('leaf', 'axes'), [('wi/kernel', IN), ('wo/kernel', OUT), ('wi/bias', ('expert', 'expert_mlp'))]
)
def test_drop_takes_the_statistics_of_what_it_drops(leaf, axes, ratio):
    # All neurons differ: dropped entries have their own mean and deviation, not those of the leaf.
    rng = np.random.default_rng(0)
    width, depth = 400, 600
    w = (np.arange(width) + rng.standard_normal((depth, width)) * 0.1).astype(np.float32)
    if leaf == 'wi/bias':
        width = 100_000
        w = np.arange(width, dtype=np.float32)
    w = w.T if axes == OUT else w
    row = Row(f'm/expert/{leaf}', (f'm/{leaf}',), Action.EXPERTS, (1, *w.shape), jnp.float32, axes)
    (made,) = make_expert(Drop(ratio=ratio), [row], {f'm/{leaf}': w}, 0).values()
    changed = np.asarray(made) != w
    which = changed if w.ndim == 1 else changed.any(axis=1 if axes == OUT else 0)
    assert which.sum() == int(ratio * width + 1e-6)
    dropped, drawn = (x[which] if w.ndim == 1 or axes == OUT else x[:, which] for x in (w, made))
    assert np.mean(drawn) == pytest.approx(dropped.mean(), abs=4 * dropped.std() / np.sqrt(drawn.size))
    assert np.std(drawn) == pytest.approx(dropped.std(), rel=0.05)
    if w.ndim > 1 and ratio < 1:
        assert abs(dropped.std() - w.std()) > 0.1  # so the test can fail


@pytest.mark.parametrize(('initializer', 'variance'), [('lecun_normal', 1 / 300), ('xavier_uniform', 2 / (300 + 200))])
def test_random_starts_as_its_family_does(initializer, variance):
    row = Row('m/expert/wi/kernel', (), Action.EXPERTS, (2, 300, 200), jnp.float32, IN)
    bias = Row('m/expert/wi/bias', (), Action.EXPERTS, (2, 200), jnp.float32, ('expert', 'expert_mlp'))
    made = make_expert(Random(initializer=initializer), [row, bias], {}, 1)
    assert np.var(made[row.target]) == pytest.approx(variance, rel=0.03)
    assert not made[bias.target].any()


def test_random_can_keep_some_copies():
    made, dense = experts('vit', Random(copied=2))
    assert all(all(equal(expert, dense).values()) for expert in made[:2])
    assert not any(any(equal(expert, dense).values()) for expert in made[2:])


@pytest.mark.parametrize('name', [name for name, kind in EXPERT_OPERATORS.items() if kind.starts_from is Start.DENSE])
def test_the_target_has_its_type_and_shape(name):
    operator = EXPERT_OPERATORS[name]()
    rows = rows_of('vit', operator, dtype=jnp.bfloat16)
    if not operator.keeps_shape:
        halved = {F: F // 2, D: D, E: E}
        rows = [dataclasses.replace(row, shape=tuple(halved[n] for n in row.shape)) for row in rows]
    made = make_expert(operator, rows, mlp_of('vit'), 1)
    assert all(made[row.target].dtype == jnp.bfloat16 and made[row.target].shape == row.shape[1:] for row in rows)


@pytest.mark.parametrize(
    ('make', 'binding'),
    [
        (lambda: Drop(ratio=1.5), 'DROP_RATIO = 1.5'),
        (lambda: Drop(indices='some'), 'DROP_INDICES'),
        (lambda: Noise(stddev=-1), 'NOISE_STDDEV'),
        (lambda: Noise(fraction=2), 'NOISE_FRACTION'),
        (lambda: Random(initializer='zeros'), 'RANDOM_INITIALIZER'),
        (lambda: Random(copied=-1), 'RANDOM_COPIED'),
    ],
)
def test_nonsense_is_refused(make, binding):
    with pytest.raises(UserError, match=binding):
        make()


def test_names_and_options_are_shown():
    assert str(Copy()) == 'copy'
    assert str(Drop(ratio=0.3)) == 'drop(ratio=0.3, indices=shared)'
    assert all(kind.name == name for name, kind in EXPERT_OPERATORS.items())
