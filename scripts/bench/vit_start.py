"""Measures time and memory from a public ViT file to the first sparse state. Makes a file of that layout, and cleans up.

  python scripts/bench/vit_start.py                   # ViT-B/16, 21843 classes; 32 experts in the last 6 blocks, 8 CPU devices

`import` is `upcycle import --format=vit_npz` as a user runs it. `online` plans, reads, and places every expert on its device, as
a trainer does when it starts. The devices of a CPU share the host's memory, so the peak holds the whole sparse state and working
memory. The function check, which depends on the batch and the model's compilation, is left out.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import jax
from convert import make_dense, peak

from upcycle import configuration, partitioning
from upcycle.training import first_state
from upcycle.training import state as states
from upcycle.training.start import Start

DENSE_STEP = 1000
# Imports of the command, to measure the interpreter.
_INTERPRETER = 'import upcycle.commands.train, upcycle.transfer, jax; jax.devices()'


def start(path: str, files: list[str], bindings: dict[str, str]) -> None:
    """Prints the time and size of the sparse state, and the peak of the process."""
    run = configuration.load(files, {'INITIAL_CHECKPOINT_PATH': path, 'DENSE_STEP': str(DENSE_STEP), **bindings})
    mesh = partitioning.make_mesh((1, jax.device_count(), 1), run.num_experts)
    where = states.make_layout(run, mesh, run.model.smallest_batch())
    first_state.check_function = lambda *arguments: {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.monotonic()
    state, _ = first_state.from_checkpoint(Start(run, mesh, where), {})
    jax.block_until_ready(state)
    seconds = time.monotonic() - begin
    # Unsharded leaves lie on every device.
    size = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - size
    found = {
        'seconds': round(seconds, 1),
        'state GB': round(size / 1e9, 2),
        'peak besides the state, GB': round(extra / 1e9, 2),
    }
    print(json.dumps({'online': found}))


def main() -> None:
    """Makes the file, imports it and starts from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='vit_b16')
    parser.add_argument('--classes', default='21843')
    parser.add_argument('--optimizer_state', default='fresh', help='the file holds none, so it cannot be tiled')
    parser.add_argument('--folder', default='.')
    parser.add_argument('--from', dest='source', help=argparse.SUPPRESS)
    options = parser.parse_args()
    files = [f'models/{options.model}.gin', 'moe/vit.gin', 'runs/convert.gin']
    bindings = {'NUM_CLASSES': options.classes, 'OPTIMIZER_STATE': options.optimizer_state}
    if options.source:
        start(options.source, files, bindings)
        return
    folder = pathlib.Path(options.folder) / 'bench_vit_start'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        path = make_dense(files, str(folder / 'vit.npz'), 'vit_npz', **bindings)
        _, interpreter = peak([sys.executable, '-c', _INTERPRETER])
        command = [sys.executable, '-m', 'upcycle', 'import', '--format=vit_npz', f'--from={path}']
        seconds, resident = peak([*command, f'--to={folder / "imported"}', f'--step={DENSE_STEP}'])
        found = {
            'file GB': round(os.path.getsize(path) / 1e9, 2),
            'seconds': round(seconds, 1),
            'peak GB': round(resident / 1e9, 2),
            'interpreter GB': round(interpreter / 1e9, 2),
        }
        print(json.dumps({'import': found}), flush=True)
        peak([sys.executable, *sys.argv, f'--from={path}'])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    main()
