"""Damaged checkpoints."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import msgpack
import numpy as np
from flax.traverse_util import unflatten_dict

from fuzzing.case import ANOTHER, BLIND, SAME, SILENT, Case
from fuzzing.configurations import TEXT
from fuzzing.damage import damaged, mutated
from upcycle import configuration, inspection, partitioning
from upcycle.checkpoints import create_checkpoint, open_checkpoint
from upcycle.checkpoints.integrity import require_whole
from upcycle.checkpoints.native import CheckpointManager
from upcycle.models import identify
from upcycle.training.optimizer import Adafactor
from upcycle.training.state import make_layout

# Kind, description, and a function that does the damage.
Damage = tuple[str, str, Callable[[], Any]]
# Without a checksum, damage to numbers in metadata cannot be distinguished from other weights.
SEMANTIC = 'metadata'


class Checkpoints:
    """Makes cases of damaged checkpoints: one folder per format, which is restored after each case."""

    def __init__(self, folder: pathlib.Path):
        self._paths = {**_written(folder), **_by_t5x(folder)}
        self._whole = {name: _contents(path) for name, path in self._paths.items()}

    def __call__(self, rng: random.Random) -> Case:
        name = rng.choice(sorted(self._paths))
        path = self._paths[name]
        files = [path] if path.is_file() else sorted(file for file in path.rglob('*') if file.is_file())
        indices = [file for file in files if _is_index(file)]
        file = rng.choice(indices) if indices and rng.random() < 0.6 else rng.choice(files)
        ways = [self._bytes, self._bytes]
        if file in indices:
            ways += [self._index] * 4
        if path.is_dir():
            ways.append(self._place)
        way = rng.choice(ways)
        kind, description, carry_out = way(rng, file, files)

        def run() -> str:
            with _restored(path):
                carry_out()
                return self._compare(name, path, kind, file)

        return Case(f'{name}: {kind}', f'{path}: {file.relative_to(path.parent)}: {description}', run)

    def _compare(self, name: str, path: pathlib.Path, kind: str, file: pathlib.Path) -> str:
        leaves, facts = _contents(path)
        whole, whole_facts = self._whole[name]
        changed = [n for n in leaves.keys() & whole.keys() if not _same(leaves[n], whole[n])]
        if changed and name.startswith('safetensors'):
            return BLIND
        # A reshaped or renamed leaf is another checkpoint, which a plan compares with the model; other values are wrong weights.
        if any(
            n != 'step' and leaves[n].shape == whole[n].shape and leaves[n].dtype == whole[n].dtype for n in changed
        ):
            # The format cannot tell: T5X writes no checksums except gzip's, the checksum of a file does not contain its place,
            # and a rewritten archive has right checksums.
            rewritten = name == 'npz' and kind == SEMANTIC
            blind = (
                kind == 'files' or rewritten or name == 'by_t5x_orbax' or (name == 'by_t5x_legacy' and _is_index(file))
            )
            return BLIND if blind else SILENT
        return SAME if not changed and leaves.keys() == whole.keys() and facts == whole_facts else ANOTHER

    def _bytes(self, rng: random.Random, file: pathlib.Path, files: list[pathlib.Path]) -> Damage:
        what, content = damaged(rng, file.read_bytes())
        return 'bytes', what, lambda: file.write_bytes(content)

    def _place(self, rng: random.Random, file: pathlib.Path, files: list[pathlib.Path]) -> Damage:
        other = rng.choice(files)

        def swap() -> None:
            mine, others = file.read_bytes(), other.read_bytes()
            file.write_bytes(others)
            other.write_bytes(mine)

        def becomes_a_folder() -> None:
            file.unlink()
            file.mkdir()

        def points_away() -> None:
            file.unlink()
            file.symlink_to(rng.choice(('/nowhere', file.name, '/dev/null')))

        ways = {
            'removed': file.unlink,
            'folder removed': lambda: shutil.rmtree(file.parent),
            f'swapped with {other.name}': swap,
            'a folder': becomes_a_folder,
            'a link': points_away,
            'renamed': lambda: file.rename(file.with_name(file.name + 'x')),
            'a copy of another': lambda: shutil.copyfile(other, file) if other != file else None,
        }
        what = rng.choice(sorted(ways))
        return 'files', what, ways[what]

    def _index(self, rng: random.Random, file: pathlib.Path, files: list[pathlib.Path]) -> Damage:
        before = file.read_bytes()
        if file.suffix == '.npz':
            what, content = _other_archive(rng, before)
        elif file.suffix == '.safetensors':
            length = int.from_bytes(before[:8], 'little')
            what, tree = mutated(rng, json.loads(before[8 : 8 + length]))
            header = json.dumps(tree).encode()
            claimed = rng.choice((len(header),) * 9 + (2**60, 2**63 + 5, 0, len(header) - 1))
            content = claimed.to_bytes(8, 'little') + header + before[8 + length :]
        elif file.name == 'checkpoint':
            what, tree = mutated(rng, msgpack.unpackb(before, raw=False))
            content = msgpack.packb(tree)
        else:
            what, tree = mutated(rng, json.loads(before))
            content = json.dumps(tree).encode()
        return SEMANTIC, what, lambda: file.write_bytes(content)


def _is_index(file: pathlib.Path) -> bool:
    is_named = file.name in ('checkpoint', '_METADATA', '.zarray', 'metadata')
    return (is_named or file.suffix in ('.npz', '.safetensors', '.json')) and file.stat().st_size > 2


def _written(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes a checkpoint in each of our formats, and one as a training run saves it; returns their paths."""
    t5, vit = random_tree(('models/t5_1_1_tiny.gin', TEXT)), random_tree(('models/vit_mini.gin', 'tasks/mnist5k.gin'))
    dense_t5, dense_vit = (
        {n: v for n, v in tree.items() if n.startswith('params/') or n == 'step'} for tree in (t5, vit)
    )
    trees = {
        'upcycle': (t5, folder / 'native', 'upcycle'),
        't5x_legacy': (t5, folder / 'legacy', 't5x_legacy'),
        't5x_orbax': (t5, folder / 'orbax', 't5x_orbax'),
        'npz': (dense_vit, folder / 'vit.npz', 'vit_npz'),
        'safetensors': (dense_t5, folder / 'hf', 'huggingface'),
    }
    paths = {name: write_checkpoint(path, format, tree) for name, (tree, path, format) in trees.items()}
    with CheckpointManager(folder / 'trained') as manager:
        manager.save(100, unflatten_dict(t5, sep='/'), {}, {'family': 't5'})
    return paths | {'trained': folder / 'trained' / 'checkpoints' / '100'}


def random_tree(files: tuple[str, ...], **bindings: str) -> dict[str, np.ndarray]:
    """Returns random leaves of a tiny model and its Adafactor state."""
    vocabulary = {'NUM_EMBEDDINGS': '40', 'MLP_DIM': '24'} if TEXT in files else {'NUM_LAYERS': '2'}
    small = {'MODEL_DIR': 'unused', 'TRAIN_STEPS': '1', 'EMBED_DIM': '16', 'NUM_HEADS': '2', **vocabulary}
    small |= {'HEAD_DIM': '6'} if TEXT in files else {}
    run = configuration.load((*files, 'runs/pretrain.gin'), small | bindings)
    run = dataclasses.replace(run, optimizer=Adafactor(min_dim_size_to_factor=16))
    mesh = partitioning.make_mesh((1, 1, 1), None, jax.devices()[:1])
    with partitioning.use(mesh):
        leaves = make_layout(run, mesh, run.model.smallest_batch()).flat()
    rng = np.random.default_rng(0)
    tree = {name: rng.random(leaf.shape).astype(leaf.dtype) for name, leaf in leaves.items()}
    return tree | {name: np.asarray(100, np.int32) for name in ('step', 'opt_state/count')}


def write_checkpoint(path: pathlib.Path, format: str, tree: Mapping[str, np.ndarray]) -> pathlib.Path:
    leaves = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in tree.items()}
    writer = create_checkpoint(path, format, leaves, step=100, identity={}, metadata={})
    for name, regions in writer.todo().items():
        for region in regions:
            writer.write(name, region, tree[name][region])
    writer.finish({'family': 't5'})
    return pathlib.Path(writer.path)


def _by_t5x(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Copies the checkpoints written by T5X, if UPCYCLE_FIXTURES is set; returns their paths."""
    fixtures = os.environ.get('UPCYCLE_FIXTURES')
    copies = {}
    for name in ('legacy', 'orbax') if fixtures else ():
        source = pathlib.Path(fixtures) / f't5x_dense_{name}' / 'checkpoint_100'
        target = folder / f'by_t5x_{name}' / 'checkpoint_100'
        shutil.copytree(source, target, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns('*dataset*'))
        copies[f'by_t5x_{name}'] = target
    return copies


@contextlib.contextmanager
def _restored(path: pathlib.Path) -> Iterator[None]:
    """Restores a checkpoint on exit."""
    files = [path] if path.is_file() else [file for file in path.rglob('*') if file.is_file()]
    before = {file: file.read_bytes() for file in files}
    try:
        yield
    finally:
        for file in [path] if path in before else list(path.rglob('*')):
            if file.is_symlink() or (file.is_file() and file not in before):
                file.unlink()
        for file, content in before.items():
            if file.is_dir():
                shutil.rmtree(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)


def _contents(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Runs the checks of import, export and conversion, then reads all leaves; returns the leaves and all other facts."""
    reader = open_checkpoint(path)
    require_whole(reader.path)
    leaves = reader.leaves()
    facts = identify.facts_of(reader.metadata)
    identify.check(str(path), leaves, facts)
    inspection.describe(reader, quick=True)
    values = {name: np.asarray(reader.read(name)) for name in leaves}
    return values, {'facts': facts, 'step': reader.step, 'metadata': dict(reader.metadata)}


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    return (left.shape, left.dtype, left.tobytes()) == (right.shape, right.dtype, right.tobytes())


def _other_archive(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Changes the name or header of one member of a zip archive."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    data = members.pop(name)
    way = rng.choice(('name', 'header', 'gone', 'pickle', 'twice', 'bomb', 'metadata'))
    if way == 'name':
        names = ('../x.npy', '/x.npy', 'params/x.npy', 'x', name.replace('0', '99999999'), name + '/../a.npy')
        members[rng.choice((*names, '\u2603.npy'))] = data
    elif way == 'header' and data[:6] == b'\x93NUMPY':
        size = int.from_bytes(data[8:10], 'little')
        header = data[10 : 10 + size].decode()
        dtypes = (("'<f4'", "'|O'"), ("'<f4'", "'<f8'"), ('False', 'True'), ("'<f4'", "'<i4'"))
        old, new = rng.choice((*dtypes, ('(', f'({2**60}, '), ('(', '(-1, ')))
        changed = header.replace(old, new, 1).rstrip().ljust(size - 1)[: size - 1] + '\n'
        members[name] = data[:10] + changed.encode() + data[10 + size :]
    elif way == 'pickle':
        buffer = io.BytesIO()
        np.save(buffer, np.array([{'a': 1}], dtype=object), allow_pickle=True)
        members[name] = buffer.getvalue()
    elif way == 'bomb':
        members[name] = data + bytes(50_000_000)
    elif way == 'metadata':
        members[name] = data
        members['metadata.json'] = rng.choice(
            (b'', b'{', b'[]', b'3', b'{"facts": 3}', b'{"facts": {"gelu": 7}}', b'{"family": []}', b'null')
        )
    elif way != 'gone':
        members[name] = data
        members[f'./{name}'] = data
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED if way == 'bomb' else zipfile.ZIP_STORED) as new_archive:
        for member, bytes_ in members.items():
            new_archive.writestr(member, bytes_)
    return f'{way}: {name}', out.getvalue()
