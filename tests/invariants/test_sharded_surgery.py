"""Upcycling onto a mesh: the same bytes as on one device, and no device ever holds more than its own experts."""

import json
import math
import sys

import jax
import numpy as np
import pytest

from tests.invariants.devices import run
from tests.small import init, random_batch, small_t5, with_moe
from upcycle import partitioning
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.surgery.execute import execute, sha256_of
from upcycle.surgery.operators import Noise
from upcycle.surgery.plan import Action, Surgery, plan

E = 8
SURGERIES = {
    'copy': Surgery(),
    'noise': Surgery(operator=Noise(fraction=0.5), router_init='orthogonal'),
    'random': Surgery(operator='random'),
    'drop': Surgery(operator='drop'),
}


def main(shape: tuple[int, int, int]) -> None:
    """Upcycles a small T5 in every way and prints, as JSON, the hash of every leaf and the most bytes that a device held."""
    from flax.traverse_util import flatten_dict
    from jax.sharding import NamedSharding

    model = EncoderDecoderModel(with_moe(small_t5(), num_experts=E))
    batch = random_batch()
    dense_params, _ = init(model.dense(), batch)
    dense = {f'params/{name}': np.asarray(leaf) for name, leaf in flatten_dict(dense_params, sep='/').items()}
    dense['step'] = np.int32(7)
    del dense_params
    spec = {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()}
    boxed = jax.eval_shape(lambda key: model.init(key, spec), jax.random.key(0))
    mesh = partitioning.make_mesh(shape, E)
    specs = partitioning.param_specs(boxed, mesh)
    sparse = {f'params/{name}': leaf for name, leaf in flatten_dict(partitioning.unbox(boxed), sep='/').items()}
    shardings = {f'params/{name}': NamedSharding(mesh, leaf) for name, leaf in flatten_dict(specs, sep='/').items()}
    sparse['step'] = jax.ShapeDtypeStruct((), np.int32)
    shardings['step'] = partitioning.replicated(mesh)
    abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in dense.items()}
    axes = {f'params/{n}': tuple(a) for n, a in flatten_dict(partitioning.logical_axes(boxed), sep='/').items()}
    found = {}
    for name, spec in SURGERIES.items():
        what = plan(abstract, sparse, spec, axes)
        before, most = held(), [0]

        def look(*_, before=before, most=most) -> None:
            most[0] = max(most[0], held() - before)

        target = execute(
            what,
            # Without a sharding it is wanted on the host.
            lambda name, sharding: dense[name] if sharding is None else jax.device_put(dense[name], sharding),
            shardings,
            new={},
            on_source=look,
            progress=look,
        )
        experts = [row.target for row in what.rows if row.action is Action.EXPERTS]
        mlp = [row for group in what.groups() if group[0].action is Action.EXPERTS for row in group][:3]
        found[name] = {
            'hashes': {name: sha256_of(name, np.asarray(leaf)) for name, leaf in target.items()},
            'most': most[0],
            'end': held() - before,
            'largest_source': max(leaf.nbytes for leaf in dense.values()),
            'mlp': sum(math.prod(row.shape[1:]) * 4 for row in mlp),
            'experts_on_a_device': {
                name: [shard.data.shape[0] for shard in target[name].addressable_shards] for name in experts
            },
        }
        del target
    print(json.dumps(found))


def held() -> int:
    """Bytes on the fullest device."""
    totals: dict[int, int] = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            totals[shard.device.id] = totals.get(shard.device.id, 0) + shard.data.nbytes
    return max(totals.values(), default=0)


def on(devices: int, shape: str) -> dict:
    """What `main` prints there, by surgery."""
    return json.loads(run(['-m', 'tests.invariants.test_sharded_surgery', shape], devices).splitlines()[-1])


@pytest.fixture(scope='module')
def found() -> dict[str, dict]:
    """By mesh."""
    return {'one': on(1, '1,1,1'), 'eight': on(8, '1,8,1'), 'split': on(8, '2,2,2')}


@pytest.mark.parametrize('name', SURGERIES)
def test_the_same_bytes_on_one_device_and_on_eight(found, name):
    one, eight, split = (found[mesh][name] for mesh in ('one', 'eight', 'split'))
    assert one['hashes'] == eight['hashes'] == split['hashes']
    assert all(counts == [1] * 8 for counts in eight['experts_on_a_device'].values())
    assert all(counts == [4] * 8 for counts in split['experts_on_a_device'].values())


def test_memory(found):
    for on_mesh in found.values():
        # Beside what it keeps, a device holds at most the one dense leaf that is being spread,
        copy = on_mesh['copy']
        assert copy['most'] <= copy['end'] + 2 * copy['largest_source']
        # or one MLP, where experts differ.
        for name, other in on_mesh.items():
            assert other['most'] <= other['end'] + 2 * max(other['mlp'], other['largest_source']), name


if __name__ == '__main__':
    main(tuple(int(n) for n in sys.argv[1].split(',')))
