"""Router initialisations: their scale and their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle.errors import UserError
from upcycle.surgery.make import Maker
from upcycle.surgery.plan import Action, Plan, Row, Surgery
from upcycle.surgery.router_init import DRAWN, clusters, inherited, orthogonal


@pytest.mark.parametrize('name', DRAWN)
@pytest.mark.parametrize('shape', [(256, 32), (16, 64)])
def test_entries_have_the_deviation_asked_for(name, shape):
    kernel = DRAWN[name](shape, 0.02, jax.random.key(0))
    assert kernel.shape == shape and kernel.dtype == jnp.float32
    assert float(jnp.sqrt(jnp.mean(jnp.square(kernel)))) == pytest.approx(0.02, rel=0.05)


def test_orthogonal_experts_are_at_right_angles():
    kernel = orthogonal((64, 8), 0.02, jax.random.key(1))
    np.testing.assert_allclose(kernel.T @ kernel, 64 * 0.02**2 * np.eye(8), atol=1e-7)


class TestInherited:
    old_DxO = jnp.asarray(np.random.default_rng(0).normal(size=(500, 3)), jnp.float32)
    lineage = ((0,), (1,), (2,), (1,), (0, 2))

    def make(self, init, **more):
        settings = {'stddev': 0.02, 'noise': 0.0, 'key': jax.random.key(0), **more}
        made = np.asarray(inherited(self.old_DxO, self.lineage, init, **settings))
        np.testing.assert_array_equal(made[:, :3], self.old_DxO)
        return made[:, 3:]

    def test_copied_columns_are_the_parents(self):
        new_DxN = self.make('copied')
        np.testing.assert_array_equal(new_DxN[:, 0], self.old_DxO[:, 1])
        np.testing.assert_allclose(new_DxN[:, 1], (self.old_DxO[:, 0] + self.old_DxO[:, 2]) / 2, atol=1e-6)

    def test_noise_is_a_share_of_the_routers_deviation(self):
        noise_DxN = self.make('copied', noise=0.1) - self.make('copied')
        assert np.std(noise_DxN) == pytest.approx(0.1 * float(jnp.std(self.old_DxO)), rel=0.1)

    def test_extended_columns_are_drawn(self):
        new_DxN = self.make('extended')
        assert np.std(new_DxN) == pytest.approx(0.02, rel=0.1)
        assert abs(np.corrcoef(new_DxN[:, 0], self.old_DxO[:, 1])[0, 1]) < 0.2


@pytest.mark.parametrize(
    ('operator', 'init', 'expected'),
    [
        ('copy', 'normal', [0, 0, 0, 0]),
        ('grow', 'copied', [1, 5, 1, 5]),
        ('grow', 'extended', [1, 5, 0, 0]),
        ('grow', 'normal', [0, 0, 0, 0]),
    ],
)
def test_biases_of_a_router(operator, init, expected):
    """A drawn router has no bias; new experts inherit that of their parents."""
    bias = 'params/decoder/layers_0/mlp/router/router_weights/w/bias'
    experts = Row(
        'params/decoder/layers_0/mlp/expert/wo/kernel', ('wo',), Action.EXPERTS, (4, 2, 2), jnp.float32, (None,) * 3
    )
    row = Row(bias, (bias,), Action.ROUTER, (4,), jnp.float32)
    spec = Surgery(operator, router_init=init, router_noise=0.0)
    plan = Plan((experts, row), {}, spec, num_mlps=2)
    made = Maker(plan, lambda name, sharding: np.asarray([1, 5], np.float32), new={}).leaf(row)
    np.testing.assert_array_equal(made, expected)


class TestClusters:
    def states(self, D=32, C=4, each=50):
        """Clusters around a distant common point, with their labels."""
        rng = np.random.default_rng(0)
        centre_CxD = np.linalg.qr(rng.normal(size=(D, C)))[0].T
        which_N = np.repeat(np.arange(C), each)
        x_NxD = 10 * rng.normal(size=D) + centre_CxD[which_N] + 0.05 * rng.normal(size=(C * each, D))
        return jnp.asarray(x_NxD, jnp.float32), which_N

    def test_every_cluster_finds_its_expert(self):
        x_NxD, which_N = self.states()
        # Lloyd's algorithm finds all four from most starting points.
        found = 0
        for seed in range(6):
            router_DxE = clusters(x_NxD, 4, 0.02, jax.random.key(seed))
            chosen_N = np.asarray(((x_NxD - x_NxD.mean(axis=0)) @ router_DxE).argmax(axis=-1))
            found += len({(int(a), int(b)) for a, b in zip(which_N, chosen_N, strict=True)}) == 4
        assert found >= 2

    def test_columns_have_the_size_of_a_drawn_router(self):
        router_DxE = clusters(self.states()[0], 8, 0.02, jax.random.key(0))
        assert router_DxE.shape == (32, 8) and router_DxE.dtype == jnp.float32
        np.testing.assert_allclose(jnp.sqrt(jnp.square(router_DxE).mean(axis=0)), 0.02, rtol=1e-5)

    def test_too_few_tokens(self):
        with pytest.raises(UserError, match='makes 8 clusters, and a batch has 5 real tokens: raise BATCH_SIZE'):
            clusters(jnp.ones((5, 4)), 8, 0.02, jax.random.key(0))
