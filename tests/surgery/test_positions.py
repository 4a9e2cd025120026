"""Positions for images of another size: interpolated, planned by name, and refused if they are not a square grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle.errors import UserError
from upcycle.surgery.place import execute
from upcycle.surgery.plan import Action, Surgery
from upcycle.surgery.planning import plan_surgery
from upcycle.surgery.positions import resize_positions


@pytest.mark.parametrize(('old', 'new'), [(7, 12), (12, 7), (14, 24), (1, 3)])
def test_bilinear_with_aligned_corners(old, new):
    pos = np.random.default_rng(0).normal(size=(1, old * old, 5)).astype(np.float32)
    at = np.linspace(0, old - 1, new)
    # Each row of weights interpolates linearly between the two nearest old positions.
    weight_NxO = np.maximum(1 - np.abs(at[:, None] - np.arange(old)), 0)
    expected = np.einsum('no,mp,opd->nmd', weight_NxO, weight_NxO, pos.reshape(old, old, 5))
    actual = resize_positions(jnp.asarray(pos), new * new)
    np.testing.assert_allclose(actual[0], expected.reshape(new * new, 5), atol=1e-5)


def leaves(tokens):
    return {
        'params/pos_embedding': jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32),
        'step': jax.ShapeDtypeStruct((), jnp.int32),
    }


def test_the_plan_names_it_and_execution_does_it():
    plan = plan_surgery(leaves(16), leaves(25), Surgery(operator=None), grids=('pos_embedding',))
    (row,) = [row for row in plan.rows if row.target == 'params/pos_embedding']
    assert row.action is Action.RESIZE and row.shape == (1, 25, 8)
    source = {'params/pos_embedding': jnp.ones((1, 16, 8)), 'step': jnp.asarray(3)}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = execute(plan, lambda name, sharding: source[name], dict.fromkeys(leaves(25), one), new={})
    np.testing.assert_allclose(target['params/pos_embedding'], np.ones((1, 25, 8)), rtol=1e-6)


def test_positions_that_are_not_square_are_refused():
    with pytest.raises(UserError, match='params/pos_embedding'):
        plan_surgery(leaves(16), leaves(24), Surgery(operator=None), grids=('pos_embedding',))
