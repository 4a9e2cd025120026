"""Router initialisations: their size, and what each promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle.surgery.router_init import ROUTER_INITS, orthogonal


@pytest.mark.parametrize('name', ROUTER_INITS)
@pytest.mark.parametrize('shape', [(256, 32), (16, 64)])
def test_entries_have_the_deviation_asked_for(name, shape):
    kernel = ROUTER_INITS[name](shape, 0.02, jax.random.key(0))
    assert kernel.shape == shape and kernel.dtype == jnp.float32
    assert float(jnp.sqrt(jnp.mean(jnp.square(kernel)))) == pytest.approx(0.02, rel=0.05)


def test_orthogonal_experts_are_at_right_angles():
    kernel = orthogonal((64, 8), 0.02, jax.random.key(1))
    np.testing.assert_allclose(kernel.T @ kernel, 64 * 0.02**2 * np.eye(8), atol=1e-7)
