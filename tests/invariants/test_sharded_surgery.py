"""Upcycling onto a mesh: the same bytes as on one device, and no device ever holds more than its own experts."""

import json
import sys

import jax
import numpy as np

from tests.invariants.devices import run
from tests.small import init, random_batch, small_t5, with_moe
from upcycle import partitioning
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.surgery.execute import execute, sha256_of
from upcycle.surgery.plan import Action, Surgery, plan

E = 8


def main(shape: tuple[int, int, int]) -> None:
    """Upcycles a small T5 and prints, as JSON, the hash of every leaf and the most bytes that a device held."""
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
    what = plan(abstract, sparse, Surgery())
    before, most = held(), [0]

    def look(*_) -> None:
        most[0] = max(most[0], held() - before)

    target = execute(
        what,
        lambda name, sharding: jax.device_put(dense[name], sharding),
        shardings,
        new={},
        on_source=look,
        progress=look,
    )
    experts = [row.target for row in what.rows if row.action is Action.EXPERTS]
    print(
        json.dumps(
            {
                'hashes': {name: sha256_of(name, np.asarray(leaf)) for name, leaf in target.items()},
                'most': most[0],
                'end': held() - before,
                'largest_source': max(leaf.nbytes for leaf in dense.values()),
                'experts_on_a_device': {
                    name: [shard.data.shape[0] for shard in target[name].addressable_shards] for name in experts
                },
            }
        )
    )


def held() -> int:
    """Bytes on the fullest device."""
    totals: dict[int, int] = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            totals[shard.device.id] = totals.get(shard.device.id, 0) + shard.data.nbytes
    return max(totals.values(), default=0)


def on(devices: int, shape: str) -> dict:
    return json.loads(run(['-m', 'tests.invariants.test_sharded_surgery', shape], devices).splitlines()[-1])


def test_the_same_bytes_on_one_device_and_on_eight():
    one, eight, split = on(1, '1,1,1'), on(8, '1,8,1'), on(8, '2,2,2')
    assert one['hashes'] == eight['hashes'] == split['hashes']
    assert all(counts == [1] * 8 for counts in eight['experts_on_a_device'].values())
    assert all(counts == [4] * 8 for counts in split['experts_on_a_device'].values())
    # Beside what it keeps, a device holds at most the one dense leaf that is being spread.
    for found in (one, eight, split):
        assert found['most'] <= found['end'] + 2 * found['largest_source']


if __name__ == '__main__':
    main(tuple(int(n) for n in sys.argv[1].split(',')))
