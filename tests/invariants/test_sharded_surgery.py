"""Upcycling onto a mesh, of one process or several: the same bytes as offline, and nobody holds or makes more than its part."""

import collections
import dataclasses
import functools
import gc
import hashlib
import math
import unittest.mock

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.invariants.devices import processes
from tests.invariants.first_load import held, where_they_lie
from tests.invariants.test_mesh import often_and_exhaustive
from tests.small import random_batch, small_t5, with_moe
from tests.surgery.in_memory import abstract
from upcycle import partitioning
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.surgery.make import Maker
from upcycle.surgery.operators import EXPERT_OPERATORS, Start
from upcycle.surgery.operators.dense import Noise
from upcycle.surgery.operators.sparse import Grow
from upcycle.surgery.place import execute
from upcycle.surgery.plan import Action, Plan, Row, Surgery
from upcycle.surgery.planning import plan_surgery

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
def source_of(start: Start) -> dict[str, np.ndarray]:
    """What surgeries start from."""
    rng = np.random.default_rng(0)
    models = {
        Start.DENSE: [model_of(E).dense()],
        Start.SEVERAL: [model_of(E).dense(), model_of(E).dense()],
        Start.MOE: [model_of(4)],
    }[start]
    found = [
        with_states(
            {
                name: rng.standard_normal(leaf.shape).astype(leaf.dtype)
                for name, leaf in abstract(model, random_batch())[0].items()
            },
            np.square,
        )
        | {'step': np.int32(7)}
        for model in models
    ]
    if start is Start.SEVERAL:
        return {f'{name}@{i}': leaf for i, one in enumerate(found) for name, leaf in one.items()}
    return found[0]


def plan_of(name: str) -> tuple[Plan, dict, dict]:
    """The surgery of that name, its source, and the logical axes of the target."""
    spec = SURGERIES[name]
    source = source_of(spec.operator.starts_from)
    model = model_of(E, granularity=1 if spec.operator.keeps_shape else 2)
    shapes, axes = abstract(model, random_batch())
    shapes = with_states(shapes, lambda leaf: leaf)
    axes = {name: names for name, names in with_states(axes, lambda names: names).items() if name != 'opt_state/count'}
    shapes |= dict.fromkeys(('opt_state/count', 'step'), jax.ShapeDtypeStruct((), np.int32))
    if spec.operator.keeps_shape:
        spec = dataclasses.replace(spec, optimizer_state='tile')
    stored = {leaf: jax.ShapeDtypeStruct(value.shape, value.dtype) for leaf, value in source.items()}
    return plan_surgery(stored, shapes, spec, axes), source, axes


def upcycle(name: str, shape: tuple[int, int, int]) -> dict:
    """Upcycles a small T5 in that way, on a mesh of that shape, as a run does. Called in each process.

    Returns:
      `shards`: of each leaf where the parts that this process holds lie, and their fingerprints; `extra`: the most bytes that a
      device held at any leaf apart from its part, by device; `leaf`: bytes of the largest leaf; `made`: how many experts this
      process made, by leaf.
    """
    what, source, axes = plan_of(name)
    mesh = partitioning.make_mesh(shape, E, jax.devices()[: math.prod(shape)])
    shardings = {
        row.target: NamedSharding(mesh, partitioning.mesh_axes(PartitionSpec(*axes[row.target]), row.shape, mesh))
        if row.target in axes
        else partitioning.replicated(mesh)
        for row in what.rows
    }
    gc.collect()
    before, most, made = held(), collections.Counter(), collections.Counter()

    def look(*_) -> None:
        for device, count in held().items():
            most[device] = max(most[device], count - before[device])

    def reader(name, sharding):
        leaf = np.asarray(source[name])
        return leaf if sharding is None else partitioning.put_whole(leaf, sharding)

    make = Maker.expert

    def expert(maker, row, index):
        one = make(maker, row, index)
        made[row.target] += 1
        look()
        return one

    with partitioning.use(mesh), unittest.mock.patch.object(Maker, 'expert', expert):
        target = execute(what, reader, shardings, new={}, on_source=look, progress=look)
    own = collections.Counter()
    for leaf in target.values():
        for shard in leaf.addressable_shards:
            own[shard.device.id] += shard.data.nbytes
    return {
        'shards': {
            name: [(where, hashlib.sha256(data).digest()) for where, data in where_they_lie(leaf)]
            for name, leaf in target.items()
        },
        'extra': {device: most[device] - own[device] for device in own},
        'leaf': max(leaf.nbytes for leaf in (*source.values(), *target.values())),
        'made': dict(made),
    }


@functools.cache
def offline(name: str) -> dict[str, np.ndarray]:
    """The same leaves made one expert after the other on one device, as `upcycle convert` does."""
    what, source, _ = plan_of(name)
    maker = Maker(what, lambda name, sharding: source[name], new={})
    return {row.target: whole(maker, row) for row in what.in_order()}


def whole(maker: Maker, row: Row) -> np.ndarray:
    """A leaf put together of its pieces."""
    pieces = list(maker.pieces(row))
    return np.asarray(pieces[0][1]) if pieces[0][0] is None else np.stack([np.asarray(piece) for _, piece in pieces])


@functools.cache
def on(layout: tuple[int, int], shape: tuple[int, int, int], name: str) -> list[dict]:
    """What `upcycle` returns there, of each process."""
    return processes(*layout).call(upcycle, name, shape)


# One process with eight devices, and four with two. SHARE: the experts that each of the four holds, by mesh.
ONE, FOUR = (1, 8), (4, 2)
SHARE = {(1, 8, 1): 2, (2, 2, 2): 4, (1, 2, 4): 4, (1, 1, 8): 8, (4, 2, 1): 8}
OFTEN = [
    *((ONE, (1, 8, 1), name) for name in ('copy', 'noise', 'granular', 'partial', 'merge')),
    *((FOUR, (2, 2, 2), name) for name in ('random', 'drop', 'branches', 'grow')),
]
LAYOUTS = [
    *((ONE, shape) for shape in [(1, 8, 1), (1, 1, 1), (2, 2, 2)]),
    *((FOUR, shape) for shape in [(2, 2, 2), (1, 8, 1), (1, 2, 4), (1, 1, 8), (4, 2, 1)]),
]
CASES = often_and_exhaustive([(*layout, name) for layout in LAYOUTS for name in SURGERIES], OFTEN)


def test_every_operator_is_here():
    assert {*SURGERIES} == {*EXPERT_OPERATORS} == {name for _, _, name in OFTEN}


@pytest.mark.parametrize(('layout', 'shape', 'name'), CASES)
def test_the_same_bytes_as_offline(layout, shape, name):
    expected = offline(name)
    for found in on(layout, shape, name):
        assert found['shards'].keys() == expected.keys()
        for leaf, shards in found['shards'].items():
            for where, digest in shards:
                part = expected[leaf][tuple(slice(*axis) for axis in where)]
                assert hashlib.sha256(part.tobytes()).digest() == digest, (leaf, where)


@pytest.mark.parametrize(('layout', 'shape', 'name'), CASES)
def test_memory(layout, shape, name):
    """Apart from its part a device holds one leaf at most."""
    for found in on(layout, shape, name):
        assert len(found['extra']) == min(layout[1], math.prod(shape))
        for device, extra in found['extra'].items():
            assert extra <= found['leaf'], device


@pytest.mark.parametrize(('layout', 'shape', 'name'), CASES)
def test_work(layout, shape, name):
    """A process makes the experts that its devices hold, each once, and no others."""
    what, _, _ = plan_of(name)
    differ = {row.target for row in what.rows if row.action in (Action.EXPERTS, Action.TILE) and not what.alike(row)}
    for found in on(layout, shape, name):
        assert found['made'].keys() == differ
        for leaf in differ:
            held_here = {index for where, _ in found['shards'][leaf] for index in range(*where[0])}
            assert found['made'][leaf] == len(held_here) == (E if layout == ONE else SHARE[shape])
