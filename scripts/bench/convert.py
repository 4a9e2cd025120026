"""Measures conversion at full size: speed against the disk's, and memory. Makes a dense checkpoint first, and cleans up.

  python scripts/bench/convert.py --size=base                    # T5 1.1 Base to 32 experts in every other layer: 8.0 GB
  python scripts/bench/convert.py --size=large --dtype=bfloat16  # T5 1.1 Large: 14 GB
  python scripts/bench/convert.py --pure                         # no disk: time for each byte as E grows

The disk's rate is that of one file (--disk_bytes), written in pieces of 8 MiB and synced, before and after the conversion.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import jax
import numpy as np
from timing import table

from upcycle import configuration
from upcycle.checkpoints import create_checkpoint
from upcycle.models import identify
from upcycle.surgery.plan import Action, Plan, Row, Surgery

FILES = ['models/t5_1_1_{size}.gin', 'moe/t5.gin', 'runs/convert.gin']
_PIECE = 8 << 20
# Imports of the command, to measure the interpreter.
_INTERPRETER = 'import upcycle.commands.convert, jax; jax.devices()'


def make_dense(files: Sequence[str], path: str, format: str = 'upcycle', **bindings: str) -> str:
    """Writes a dense checkpoint with random weights, leaf by leaf."""
    run = configuration.load_model(files, {'INITIAL_CHECKPOINT_PATH': 'unused', **bindings})
    leaves = {
        name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in identify.shapes(run.model.dense()).items()
    } | {'step': jax.ShapeDtypeStruct((), np.int32)}
    rng = np.random.default_rng(0)
    writer = create_checkpoint(path, format, leaves, step=1000, identity={}, metadata={})
    for name, regions in writer.todo().items():
        if name == 'step':
            writer.write(name, (), np.asarray(1000, np.int32))
            continue
        value = rng.standard_normal(leaves[name].shape, np.float32)
        for region in regions:
            writer.write(name, region, value[region])
    writer.finish({'family': run.model.family})
    return writer.path


def disk_rate(folder: pathlib.Path, size: int) -> float:
    """Returns the bytes/s of one file, written in order and synced."""
    piece = np.random.default_rng(0).bytes(_PIECE)
    file = folder / 'sequential'
    os.sync()
    start = time.monotonic()
    with file.open('wb') as stream:
        for _ in range(size // _PIECE):
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    rate = size / (time.monotonic() - start)
    file.unlink()
    os.sync()
    return rate


def peak(command: list[str]) -> tuple[float, int]:
    """Runs a command; returns its seconds and peak resident bytes."""
    start = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if after <= before:
        raise RuntimeError('an earlier command had a higher peak, which hides this one')
    return time.monotonic() - start, after * 1024


def measure(options: argparse.Namespace) -> None:
    """Measures one conversion as a user runs it, and the disk."""
    folder = pathlib.Path(options.folder) / 'bench_convert'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        files = [file.format(size=options.size) for file in FILES]
        dense = make_dense(files, str(folder / 'dense'))
        _, interpreter = peak([sys.executable, '-c', _INTERPRETER])
        command = [sys.executable, '-m', 'upcycle', 'convert', f'--from={dense}', f'--to={folder / "moe"}']
        command += [f'--gin_file={file}' for file in files[:2]]
        command += [f'--gin.NUM_EXPERTS={options.experts}', f'--optimizer_state={options.optimizer_state}']
        command += [f'--format={options.format}', *([f'--dtype={options.dtype}'] if options.dtype else [])]
        command += [f'--operator={options.operators.partition(",")[0]}']
        before = disk_rate(folder, options.disk_bytes)
        seconds, resident = peak(command)
        files_made = [file.stat() for file in (folder / 'moe').rglob('*') if file.is_file()]
        written = sum(file.st_size for file in files_made)
        on_disk = sum({file.st_ino: file.st_size for file in files_made}.values())
        shutil.rmtree(folder / 'moe')
        after = disk_rate(folder, options.disk_bytes)
        found = {
            'size': options.size,
            'experts': options.experts,
            'format': options.format,
            'dense GB': round(sum(f.stat().st_size for f in (folder / 'dense').rglob('*') if f.is_file()) / 1e9, 2),
            'operator': options.operators.partition(',')[0],
            'checkpoint GB': round(written / 1e9, 2),
            'of it on the disk GB': round(on_disk / 1e9, 2),
            'seconds': round(seconds, 1),
            'MB/s': round(written / seconds / 1e6),
            'disk MB/s before': round(before / 1e6),
            'disk MB/s after': round(after / 1e6),
            "share of the disk's rate": round(written / seconds / ((before + after) / 2), 2),
            'peak GB': round(resident / 1e9, 2),
            'interpreter GB': round(interpreter / 1e9, 2),
        }
        print(json.dumps(found, indent=1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pure(options: argparse.Namespace) -> None:
    """Times the experts of one MLP of T5 Base by their number; nothing is written."""
    from upcycle.surgery.make import Maker

    rng = np.random.default_rng(0)
    shapes = {'wi_0': (768, 2048), 'wi_1': (768, 2048), 'wo': (2048, 768)}
    axes = {'wi_0': ('mlp_embed', 'expert_mlp'), 'wi_1': ('mlp_embed', 'expert_mlp'), 'wo': ('expert_mlp', 'mlp_embed')}
    sources = {f'params/mlp/{name}/kernel': rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    rows = []

    def read(name: str, sharding: object) -> np.ndarray:
        return sources[name]

    for operator in options.operators.split(','):
        for experts in (8, 16, 32, 64, 128):
            group = [
                Row(
                    f'params/mlp/expert/{name}/kernel',
                    (f'params/mlp/{name}/kernel',),
                    Action.EXPERTS,
                    (experts, *shape),
                    np.dtype('float32'),
                    ('expert', *axes[name]),
                )
                for name, shape in shapes.items()
            ]
            plan = Plan(tuple(group), {}, Surgery(operator=operator))

            def make(plan=plan) -> int:
                maker = Maker(plan, read, new={})
                made = (np.asarray(value) for row in plan.rows for _, value in maker.pieces(row))
                # Reads each array, so that it is computed.
                return sum(value.nbytes + int(value.reshape(-1)[-1] > 9) for value in made)

            make()
            start = time.monotonic()
            size = make()
            seconds = time.monotonic() - start
            rows.append([operator, str(experts), f'{size / 1e9:.2f}', f'{seconds:.3f}', f'{seconds / size * 1e9:.3f}'])
    print(table(['operator', 'experts', 'GB', 'seconds', 'ns a byte'], rows))


def main() -> None:
    """Parses and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', default='base', help='of gin/models/t5_1_1_*.gin')
    parser.add_argument('--experts', type=int, default=32)
    parser.add_argument('--format', default='upcycle')
    parser.add_argument('--dtype')
    parser.add_argument('--optimizer_state', default='none')
    parser.add_argument('--folder', default='.', help='on the disk to be measured')
    parser.add_argument('--disk_bytes', type=int, default=4 << 30, help='of the sequential file')
    parser.add_argument('--pure', action='store_true', help='no disk')
    parser.add_argument('--operators', default='copy,noise,drop', help='with a disk, the first of them')
    options = parser.parse_args()
    (pure if options.pure else measure)(options)


if __name__ == '__main__':
    main()
