"""Which rows of a batch a process reads: by the places of its devices on the mesh, on the torus of a TPU pod too."""

import dataclasses
import itertools

import numpy as np
import pytest

from upcycle import partitioning
from upcycle.data import Share
from upcycle.sweep import paper


@dataclasses.dataclass(frozen=True)
class Device:
    """A chip that is not there, as JAX describes one."""

    id: int
    process_index: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = 'tpu'
    core_on_chip: int = 0
    slice_index: int = 0


def pod(topology, host=(2, 2, 1)):
    """The chips of a pod such as 'v4:4x8x8', whose hosts have `host` of them each."""
    kind, _, shape = topology.partition(':')
    sides = [*map(int, shape.split('x')), 1][:3]
    hosts = [side // own for side, own in zip(sides, host, strict=True)]
    found = []
    for z, y, x in itertools.product(*map(range, reversed(sides))):
        at = [place // own for place, own in zip((x, y, z), host, strict=True)]
        process = at[0] + hosts[0] * (at[1] + hosts[1] * at[2])
        found.append((process, (x, y, z)))
    names = {'v4': 'TPU v4', 'v5e': 'TPU v5 lite'}
    return [Device(i, process, coords, names[kind]) for i, (process, coords) in enumerate(sorted(found))]


PAPER = {
    (pod.topology, bindings['MESH_SHAPE'])
    for pod in (paper.POD, paper.FOUR_WAY_POD)
    for bindings in (pod.bindings, pod.sparse)
}
OTHERS = {
    ('v4:2x2x4', (1, 1, 16)),
    ('v4:2x2x4', (2, 2, 4)),
    ('v4:4x4x4', (4, 8, 2)),
    ('v4:4x4x8', (1, 16, 8)),
    ('v4:4x8x8', (8, 32, 1)),
    ('v5e:4x8', (2, 4, 4)),
    ('v5e:16x16', (4, 64, 1)),
}


@pytest.mark.parametrize(('topology', 'shape'), sorted(PAPER | OTHERS))
def test_a_process_of_a_pod_reads_what_its_devices_hold(topology, shape):
    devices = pod(topology)
    mesh = partitioning.make_mesh(shape, None, devices)
    sharding = partitioning.batch_sharding(mesh)
    of = shape[0] * shape[1]
    held = {}
    for (data, expert, _), device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(data * shape[1] + expert)
    assert len(held) == len(devices) // 4
    shares = {process: partitioning.share_of(sharding, process) for process in held}
    for process, share in shares.items():
        assert {*share.parts} == held[process]
        assert share.of == of and share.count * len(share.parts) == of
    readers = {share.index: share.parts for share in shares.values()}
    assert sorted(readers) == [*range(len(readers))] and len({*shares.values()}) == len(readers)
    assert sorted(itertools.chain.from_iterable(readers.values())) == [*range(of)]


def test_model_crosses_hosts_on_the_papers_largest_mesh():
    """Two hosts hold each part of the batch, so they read the same rows."""
    topology = paper.FOUR_WAY_POD.topology
    for shape in ((2, 32, 4), (64, 1, 4)):
        sharding = partitioning.batch_sharding(partitioning.make_mesh(shape, None, pod(topology)))
        shares = [partitioning.share_of(sharding, process) for process in range(64)]
        assert all(shares.count(share) == 2 for share in shares) and len({*shares}) == 32


@dataclasses.dataclass(frozen=True)
class Core:
    """A device of a process; no TPU."""

    id: int
    process_index: int
    device_kind: str = 'cpu'
    platform: str = 'cpu'


@pytest.mark.parametrize(
    ('owners', 'shape', 'expected'),
    [
        ('0011', (4, 1, 1), [Share(0, 2, (0, 1), 4), Share(1, 2, (2, 3), 4)]),
        ('1100', (4, 1, 1), [Share(1, 2, (2, 3), 4), Share(0, 2, (0, 1), 4)]),
        ('0101', (4, 1, 1), [Share(0, 2, (0, 2), 4), Share(1, 2, (1, 3), 4)]),
        ('0011', (1, 1, 4), [Share(0, 1, (0,), 1)] * 2),
        ('0101', (1, 2, 2), [Share(0, 1, (0, 1), 2)] * 2),
        ('00112233', (1, 2, 4), [Share(0, 2, (0,), 2)] * 2 + [Share(1, 2, (1,), 2)] * 2),
        # One part in common.
        ('000111', (3, 1, 2), [Share(0, 1, (0, 1, 2), 3)] * 2),
        # Processes 0 and 1 have two parts in common, 2 and 3 one each: everybody reads everything.
        ('01012233', (2, 2, 2), [Share(0, 1, (0, 1, 2, 3), 4)] * 4),
    ],
)
def test_readers(owners, shape, expected):
    mesh = partitioning.make_mesh(shape, None, [Core(i, int(owner)) for i, owner in enumerate(owners)])
    sharding = partitioning.batch_sharding(mesh)
    assert [partitioning.share_of(sharding, process) for process in range(len(expected))] == expected


@pytest.mark.parametrize(
    ('share', 'rows'),
    [
        (Share(), [range(12)]),
        (Share.even(1, 3), [range(4, 8)]),
        (Share(0, 2, (0, 2), 4), [range(3), range(6, 9)]),
        (Share(0, 2, (1, 2), 4), [range(3, 9)]),
        (Share(0, 1, (0, 1, 3), 4), [range(6), range(9, 12)]),
    ],
)
def test_rows(share, rows):
    assert share.rows(12) == rows
