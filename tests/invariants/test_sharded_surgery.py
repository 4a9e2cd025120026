"""Upcycling onto a mesh: the same bytes as on one device, and no device ever holds more than its own experts."""

import collections
import dataclasses
import functools
import gc
import math
import unittest.mock

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.invariants.devices import on_devices
from tests.small import random_batch, small_t5, with_moe
from tests.surgery.in_memory import abstract
from upcycle import partitioning
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.surgery.execute import Maker, execute, sha256_of
from upcycle.surgery.operators import EXPERT_OPERATORS, Start
from upcycle.surgery.operators.dense import Noise
from upcycle.surgery.operators.sparse import Grow
from upcycle.surgery.plan import Action, Row, Surgery, plan

E = 8
SURGERIES = {
    'copy': Surgery(),
    'noise': Surgery(operator=Noise(fraction=0.5), router_init='orthogonal'),
    'random': Surgery(operator='random'),
    'drop': Surgery(operator='drop'),
    'granular': Surgery(operator='granular'),
    'partial': Surgery(operator='partial'),
    'branches': Surgery(operator='branches'),
    'grow': Surgery(operator=Grow(utility='weight'), router_init='copied'),
    'merge': Surgery(operator='merge', router_init='extended'),
}


def model_of(num_experts: int, **moe) -> EncoderDecoderModel:
    return EncoderDecoderModel(with_moe(small_t5(emb_dim=64, mlp_dim=128), num_experts=num_experts, **moe))


def with_states(leaves: dict, value_of) -> dict:
    """Parameters and, for each, a second moment of its shape; and the optimizer's clock."""
    states = {
        f'opt_state/param_states/{name.removeprefix("params/")}/v': value_of(leaf) for name, leaf in leaves.items()
    }
    return leaves | states | {'opt_state/count': np.int32(7)}


@functools.cache
def sources() -> dict[Start, dict[str, np.ndarray]]:
    """What surgeries start from."""
    rng = np.random.default_rng(0)
    first, second, moe = (
        with_states(
            {
                name: rng.standard_normal(leaf.shape).astype(leaf.dtype)
                for name, leaf in abstract(model, random_batch())[0].items()
            },
            np.square,
        )
        | {'step': np.int32(7)}
        for model in (model_of(E).dense(), model_of(E).dense(), model_of(4))
    )
    several = {f'{name}@{i}': leaf for i, one in enumerate((first, second)) for name, leaf in one.items()}
    return {Start.DENSE: first, Start.SEVERAL: several, Start.MOE: moe}


def upcycle(name: str, shape: tuple[int, int, int]) -> dict:
    """Upcycles a small T5 in that way, on a mesh of that shape: the hash of every leaf and the most bytes that a device held.

    On one device also the hashes of what is made one expert after the other, as offline.
    """
    spec = SURGERIES[name]
    source = sources()[spec.operator.starts_from]
    mesh = partitioning.make_mesh(shape, E, jax.devices()[: math.prod(shape)])
    model = model_of(E, granularity=1 if spec.operator.keeps_shape else 2)
    shapes, axes = abstract(model, random_batch())
    shapes = with_states(shapes, lambda leaf: leaf)
    axes = {name: names for name, names in with_states(axes, lambda names: names).items() if name != 'opt_state/count'}
    shapes['opt_state/count'] = jax.ShapeDtypeStruct((), np.int32)
    if spec.operator.keeps_shape:
        spec = dataclasses.replace(spec, optimizer_state='tile')
    shapes['step'] = jax.ShapeDtypeStruct((), np.int32)
    shardings = {
        target: NamedSharding(mesh, partitioning.mesh_axes(PartitionSpec(*axes[target]), leaf.shape, mesh))
        if target in axes
        else partitioning.replicated(mesh)
        for target, leaf in shapes.items()
    }
    stored = {leaf: jax.ShapeDtypeStruct(value.shape, value.dtype) for leaf, value in source.items()}
    what = plan(stored, shapes, spec, axes)
    gc.collect()
    before, most = held(), dict.fromkeys((device.id for device in mesh.devices.flat), 0)

    def look(*_) -> None:
        now = held()
        for device in most:
            most[device] = max(most[device], now[device] - before[device])

    # Without a sharding it is wanted on the host.
    def read(name, sharding):
        return source[name] if sharding is None else jax.device_put(source[name], sharding)

    make = Maker.expert

    def expert(maker, row, index):
        made = make(maker, row, index)
        look()
        return made

    with unittest.mock.patch.object(Maker, 'expert', expert):
        target = execute(what, read, shardings, new={}, on_source=look, progress=look)
    experts = [row.target for row in what.rows if row.action is Action.EXPERTS]
    found = {
        'hashes': {name: sha256_of(name, np.asarray(leaf)) for name, leaf in target.items()},
        'most': most,
        'end': {device: held()[device] - before[device] for device in most},
        'largest_source': max(leaf.nbytes for leaf in source.values()),
        # The experts of a device, before their widths are split.
        'largest_experts': max(
            np.asarray(target[name].addressable_shards[0].data).shape[0] * target[name][0].nbytes for name in experts
        ),
        'experts_on_a_device': {
            name: [shard.data.shape[0] for shard in target[name].addressable_shards] for name in experts
        },
    }
    del target
    if mesh.size == 1:
        maker = Maker(what, read, new={})
        found['offline'] = {row.target: sha256_of(row.target, whole(maker, row)) for row in what.in_order()}
    return found


def whole(maker: Maker, row: Row) -> np.ndarray:
    """A leaf put together of its pieces."""
    pieces = list(maker.pieces(row))
    return np.asarray(pieces[0][1]) if pieces[0][0] is None else np.stack([np.asarray(piece) for _, piece in pieces])


def held() -> collections.Counter[int]:
    """Bytes on each device."""
    totals: collections.Counter[int] = collections.Counter()
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            totals[shard.device.id] += shard.data.nbytes
    return totals


@functools.cache
def on(shape: tuple[int, int, int], name: str) -> dict:
    """What `upcycle` returns there."""
    return on_devices(8, upcycle, name, shape)


ONE, EIGHT, SPLIT = (1, 1, 1), (1, 8, 1), (2, 2, 2)


def test_every_operator_is_here():
    assert {*SURGERIES} == {*EXPERT_OPERATORS}


@pytest.mark.parametrize('name', SURGERIES)
def test_the_same_bytes_on_one_device_and_on_eight(name):
    one, eight, split = (on(shape, name) for shape in (ONE, EIGHT, SPLIT))
    assert one['hashes'] == eight['hashes'] == split['hashes'] == one['offline']
    assert all(counts == [1] * 8 for counts in eight['experts_on_a_device'].values())
    assert all(counts == [4] * 8 for counts in split['experts_on_a_device'].values())


@pytest.mark.parametrize('name', SURGERIES)
@pytest.mark.parametrize('shape', [ONE, EIGHT, SPLIT])
def test_memory(shape, name):
    """Apart from what it keeps, a device holds at most the leaf that is being spread, or sources and one device's experts."""
    surgery = on(shape, name)
    extra = 2 * surgery['largest_source'] + (0 if name == 'copy' else surgery['largest_experts'])
    assert len(surgery['most']) == math.prod(shape)
    for device, most in surgery['most'].items():
        assert most <= surgery['end'][device] + extra, device
