"""A few-shot probe on the mesh of all devices, called in processes with several devices."""

import jax
import numpy as np

from upcycle import partitioning
from upcycle.data import WHOLE
from upcycle.evaluate import few_shot


def probe(shape='auto') -> dict:
    """Metrics of 30 classes, and the scores of a regression on more and on fewer images than features."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 24))
    mesh = partitioning.make_mesh(shape, None)
    sharding = partitioning.batch_sharding(mesh)

    def batches(count: int, batch: int = 64):
        for _ in range(count):
            labels = rng.integers(0, 30, batch).astype(np.int32)
            image = (centres[labels] + 2 * rng.normal(size=(batch, 24))).astype(np.float32)
            weights = np.ones(batch, np.float32)
            whole = {'image': image, 'labels': labels[:, None], 'weights': weights}
            yield partitioning.put_batch(whole, sharding, WHOLE)

    with partitioning.use(mesh):
        features = jax.jit(lambda params, batch: batch['image'] * params)
        train, test = (few_shot.extract(features, np.float32(3), batches(count)) for count in (8, 4))
        assert len(train.features_NxD.sharding.device_set) == jax.device_count()
        assert train.features_NxD.addressable_shards[0].data.shape[0] == 512 // partitioning.batch_shards(mesh)
        result = {'metrics': few_shot.probe(few_shot.FewShot(shots=(1, 3), num_seeds=2), train, test, 30)}
        for name, rows in (('more images than features', 99), ('fewer images than features', 19)):
            scores = few_shot.ridge(train, np.arange(rows), 30)(10.0).scores(test.features_NxD)
            result[name] = np.asarray(jax.jit(few_shot._on_every_device)(scores)).tolist()
    return result
