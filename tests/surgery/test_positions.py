"""Positions for images of another size: as SciPy zooms, in the plan by name, and refused where they are no square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from upcycle.errors import UserError
from upcycle.surgery.place import execute
from upcycle.surgery.plan import Action, Surgery
from upcycle.surgery.planning import plan_surgery
from upcycle.surgery.positions import resize_positions


@pytest.mark.parametrize(('old', 'new'), [(7, 12), (12, 7), (14, 24), (1, 3)])
def test_as_scipy_zooms(old, new):
    pos = np.random.default_rng(0).normal(size=(1, old * old, 5)).astype(np.float32)
    expected = scipy.ndimage.zoom(pos.reshape(old, old, 5), (new / old, new / old, 1), order=1)
    actual = resize_positions(jnp.asarray(pos), new * new)
    np.testing.assert_allclose(actual[0], expected.reshape(new * new, 5), atol=1e-5)


def leaves(tokens):
    return {
        'params/pos_embedding': jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32),
        'step': jax.ShapeDtypeStruct((), jnp.int32),
    }


def test_the_plan_names_it_and_execution_does_it():
    what = plan_surgery(leaves(16), leaves(25), Surgery(operator=None), grids=('pos_embedding',))
    (row,) = [row for row in what.rows if row.target == 'params/pos_embedding']
    assert row.action is Action.RESIZE and row.shape == (1, 25, 8)
    source = {'params/pos_embedding': jnp.ones((1, 16, 8)), 'step': jnp.asarray(3)}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = execute(what, lambda name, sharding: source[name], dict.fromkeys(leaves(25), one), new={})
    np.testing.assert_allclose(target['params/pos_embedding'], np.ones((1, 25, 8)), rtol=1e-6)


def test_positions_of_no_square_are_refused():
    with pytest.raises(UserError, match='params/pos_embedding'):
        plan_surgery(leaves(16), leaves(24), Surgery(operator=None), grids=('pos_embedding',))
