"""Times the start of a trainer from a dense checkpoint, against a lower bound.

  python scripts/bench/load.py                     # T5 1.1 Base to 8 experts in every other layer, on a mesh of 4 CPU devices

The lower bound restores the dense checkpoint as a dense run would, and allocates and writes the same bytes with one broadcast for
each new leaf. Ours plans, reads, shards, searches for NaN, fingerprints each leaf and initialises the routers. The
function check, which depends on the batch and the model's compilation, is left out.
"""

import argparse
import collections
import concurrent.futures
import functools
import os
import pathlib
import shutil
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=4')
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import jax
import jax.numpy as jnp
from convert import FILES, make_dense
from timing import medians, table

from upcycle import configuration, partitioning
from upcycle.checkpoints import arrays, open_checkpoint
from upcycle.surgery.place import without_leading_axis
from upcycle.training import first_state
from upcycle.training import state as states
from upcycle.training.start import Start


def main() -> None:
    """Times both, taking turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', default='base')
    parser.add_argument('--experts', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--folder', default='.')
    options = parser.parse_args()
    folder = pathlib.Path(options.folder) / 'bench_load'
    shutil.rmtree(folder, ignore_errors=True)
    try:
        files = [file.format(size=options.size) for file in FILES]
        compare(options, files, make_dense(files, str(folder / 'dense')))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(options: argparse.Namespace, files: list[str], dense: str) -> None:
    """Prints medians, and the most reads of one leaf."""
    bindings = {'INITIAL_CHECKPOINT_PATH': dense, 'NUM_EXPERTS': str(options.experts)}
    run = configuration.load(files, bindings)
    mesh = partitioning.make_mesh((1, jax.device_count(), 1), run.num_experts)
    where = states.make_layout(run, mesh, run.model.smallest_batch())
    targets = where.flat()
    reads: collections.Counter[str] = collections.Counter()

    read = arrays.ArrayReader.read
    first_state.check_function = lambda *arguments: {}

    def ours():
        arrays.ArrayReader.read = lambda self, name, *rest, **more: (
            reads.update([name]) or read(self, name, *rest, **more)
        )
        state, _ = first_state.from_checkpoint(Start(run, mesh, where), {})
        arrays.ArrayReader.read = read
        return state.params, state.opt_state

    def least():
        reader = open_checkpoint(dense)
        stored = reader.leaves()
        sources = {name: ''.join(name.split('/expert')) for name in targets if name.startswith('params/')}
        placed = {
            source: without_leading_axis(targets[name].sharding) if source != name else targets[name].sharding
            for name, source in sources.items()
            if source in stored
        }
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            restored = dict(zip(placed, pool.map(lambda name: reader.read(name, placed[name]), placed), strict=True))
        made = {}
        for name, leaf in targets.items():
            source = sources.get(name)
            if source == name and name in restored:
                made[name] = restored[name]
            elif source in restored:
                made[name] = broadcast(leaf.shape, leaf.sharding)(restored.pop(source))
            else:
                made[name] = zeros(leaf.shape, leaf.dtype, leaf.sharding)()
        return made

    @functools.cache
    def broadcast(shape, sharding):
        return jax.jit(lambda x: jnp.broadcast_to(x, shape), out_shardings=sharding)

    @functools.cache
    def zeros(shape, dtype, sharding):
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)

    found = medians({'ours': ours, 'the least': least}, options.rounds)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in targets.values())
    rows = [[name, f'{seconds:.2f}', f'{seconds / found["the least"]:.2f}'] for name, seconds in found.items()]
    print(f'{size / 1e9:.2f} GB of state, {jax.device_count()} devices, {options.experts} experts')
    print(table(['start', 'seconds', 'over the least'], rows))
    most = max(count for name, count in reads.items() if name.startswith('params/')) / (options.rounds + 1)
    print(f'the most reads of one leaf in a start: {most:g}')


if __name__ == '__main__':
    main()
