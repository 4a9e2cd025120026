"""The first load of a checkpoint into a run, and what devices and processes hold at every leaf on the way."""

import collections
import gc
import json
import resource
import unittest.mock

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from tests import runs
from upcycle import configuration, partitioning
from upcycle.checkpoints.arrays import ArrayReader
from upcycle.checkpoints.native import CheckpointManager
from upcycle.surgery.make import Maker
from upcycle.training import first_state, receipt_of_start
from upcycle.training import state as states
from upcycle.training.start import Start


def save_dense(path, kind='dense', seed=0, **sizes):
    """A dense run's checkpoint of step 4, as it was initialised."""
    run = runs.build(kind, path, 10, **sizes)
    where = Start.of(run).layout
    state = states.as_dict(states.initializer(run, where)(jax.random.key(seed)))
    model = json.loads(json.dumps(run.model.describe(), default=str))
    with CheckpointManager(path) as manager:
        manager.save(4, {**state, 'step': state['step'] + 4}, {}, {'family': run.model.family, 'model': model})


def held():
    """Bytes on each device of this process."""
    # An array and the views of its parts share buffers.
    buffers = {
        (shard.device.id, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for array in jax.live_arrays()
        for shard in array.addressable_shards
    }
    totals = collections.Counter()
    for (device, _), count in buffers.items():
        totals[device] += count
    return totals


def resident():
    """Bytes of this process in memory."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def load(files, bindings):
    """Loads it as a run does at its start.

    Returns:
      `extra`: the most bytes that each device held at any leaf apart from its part of the state; `own`: that part; `leaf`: bytes
      of the largest leaf of source or state, whole; `resident`: the most bytes by which the process grew; the `receipt`; for each
      leaf `shards`: where they lie and their bytes, and `types`: its type and shape; `made`: experts made by this process.
    """
    run = configuration.load(files, bindings)
    start = Start.of(run)
    most, made = collections.Counter(), collections.Counter()
    with partitioning.use(start.mesh):
        batch = next(partitioning.batches(run.train_data, 0, partitioning.batch_sharding(start.mesh)))
        gc.collect()
        before, started = held(), resident()
        grown = [0]

        def look(*_):
            for device, count in held().items():
                most[device] = max(most[device], count - before[device])
            grown[0] = max(grown[0], resident() - started)

        def looking(function, counts=False):
            def call(*arguments, **named):
                if counts:
                    made[arguments[1].target] += 1
                result = function(*arguments, **named)
                look()
                return result

            return call

        def at_entry(function):
            return lambda *arguments: (look(), function(*arguments))[1]

        with (
            unittest.mock.patch.object(first_state.Progress, 'show', look),
            unittest.mock.patch.object(ArrayReader, 'read', looking(ArrayReader.read)),
            unittest.mock.patch.object(Maker, 'expert', looking(Maker.expert, counts=True)),
            unittest.mock.patch.object(first_state, 'check_function', at_entry(first_state.check_function)),
            unittest.mock.patch.object(receipt_of_start, 'check_function', at_entry(receipt_of_start.check_function)),
        ):
            state, receipt = first_state.from_checkpoint(start, batch)
        leaves = flatten_dict(states.as_dict(state), sep='/')
        own = collections.Counter()
        for leaf in leaves.values():
            for shard in leaf.addressable_shards:
                own[shard.device.id] += shard.data.nbytes
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in (*start.reader.leaves().values(), *leaves.values())]
    return {
        'extra': {device: most[device] - own[device] for device in own},
        'own': dict(own),
        'leaf': max(sizes),
        'resident': grown[0],
        'receipt': receipt,
        'made': dict(made),
        'types': {name: (leaf.dtype.name, leaf.shape) for name, leaf in leaves.items()},
        'shards': {name: where_they_lie(leaf) for name, leaf in leaves.items()},
    }


def where_they_lie(leaf):
    """Of the parts of a leaf that this process holds: start and stop along every axis, and their bytes."""
    return [
        (
            tuple(axis.indices(size)[:2] for axis, size in zip(shard.index, leaf.shape, strict=True)),
            np.asarray(shard.data).tobytes(),
        )
        for shard in leaf.addressable_shards
    ]
