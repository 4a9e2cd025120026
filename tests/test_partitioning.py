"""The mesh: what 'auto' chooses, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from upcycle import partitioning
from upcycle.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh looks at."""

    id: int
    slice_index: int
    platform: str = 'cpu'
    device_kind: str = 'cpu'
    process_index: int = 0


def devices(count, slices=1):
    return [Device(i, i * slices // count) for i in range(count)]


@pytest.fixture(autouse=True)
def meshes_of_anything(monkeypatch):
    """Meshes of devices that there are not: only their shape is looked at."""
    lay_out = lambda shape, devices, **_: np.array(devices, object).reshape(shape)  # noqa: E731
    hybrid = lambda inside, between, devices, **_: lay_out(np.multiply(inside, between), devices)  # noqa: E731
    monkeypatch.setattr(partitioning.mesh_utils, 'create_device_mesh', lay_out)
    monkeypatch.setattr(partitioning.mesh_utils, 'create_hybrid_device_mesh', hybrid)
    monkeypatch.setattr(partitioning, 'Mesh', lambda array, *_, **__: array)


@pytest.mark.parametrize(
    ('count', 'slices', 'experts', 'shape'),
    [
        (1, 1, None, (1, 1, 1)),
        (8, 1, None, (8, 1, 1)),
        (8, 1, 32, (1, 8, 1)),
        (64, 1, 32, (2, 32, 1)),
        (8, 1, 4, (2, 4, 1)),  # fewer experts than devices
        (8, 1, 6, (4, 2, 1)),
        (32, 2, 32, (2, 16, 1)),  # experts within a slice
        (32, 4, 4, (8, 4, 1)),
    ],
)
def test_auto(count, slices, experts, shape):
    assert partitioning.make_mesh('auto', experts, devices(count, slices)).shape == shape


@pytest.mark.parametrize(
    ('shape', 'experts', 'slices', 'message'),
    [
        ('all', None, 1, "MESH_SHAPE = .* must be 'auto' or three sizes"),
        ((2, 4), None, 1, "must be 'auto' or three sizes"),
        ((2, 2, 0), None, 1, "must be 'auto' or three sizes"),
        ((2, 2, 1), None, 1, 'needs 4 devices, but there are 8'),
        ((1, 8, 1), 4, 1, 'NUM_EXPERTS = 4 does not divide among the 8 shards'),
        ((1, 8, 1), 8, 2, 'only the data axis may cross slices'),
    ],
)
def test_refusals(shape, experts, slices, message):
    with pytest.raises(UserError, match=message):
        partitioning.make_mesh(shape, experts, devices(8, slices))


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = jax.sharding.AbstractMesh((2, 4, 2), partitioning.MESH_AXES)
    spec = jax.sharding.PartitionSpec
    axes = spec('expert', 'embed', 'expert_mlp')
    assert partitioning.mesh_axes(axes, (8, 6, 6), mesh) == spec('expert', None, 'model')
    assert partitioning.mesh_axes(axes, (6, 6, 5), mesh) == spec(None, None, None)
    assert partitioning.mesh_axes(axes, (8, 6, 6), mesh, over_data=True) == spec('expert', 'data', 'model')


def test_parameters_outside_experts_are_split_over_all_devices():
    mesh = jax.sharding.AbstractMesh((2, 4, 2), partitioning.MESH_AXES)
    spec = jax.sharding.PartitionSpec
    axes = spec('embed', 'mlp')
    assert partitioning.mesh_axes(axes, (16, 6), mesh, over_data=True) == spec(('data', 'expert'), 'model')
    assert partitioning.mesh_axes(axes, (6, 6), mesh, over_data=True) == spec('data', 'model')
    assert partitioning.mesh_axes(spec('expert', 'mlp_embed'), (8, 16), mesh, over_data=True) == spec('expert', 'data')
