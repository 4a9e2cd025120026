"""ViT checkpoints in `.npz` files: the layouts of vision_transformer, big_vision and V-MoE, read one array at a time.

An `.npz` is a zip of `.npy` files. Nothing is ever unpickled, and no array's bytes are touched before it is read. Whatever the
layout, the names are ours, big_vision's of today with the layers apart: `params/Transformer/encoderblock_0/MlpBlock_0/...`.
Layouts matched: vision_transformer/vit_jax/checkpoint.py and models_vit.py; big_vision/models/vit.py (`fix_old_checkpoints`)
and utils.py (`load_params`, `recover_dtype`); vmoe/nn/vit_moe.py; flax's `convert_pre_linen` for the numbering of layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import threading
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from upcycle import outputs
from upcycle.checkpoints import arrays, writing
from upcycle.errors import UserError
from upcycle.leaf_names import grouped

METADATA = 'metadata.json'  # a member of ours beside the arrays; those who read parameters only never look at it

# No deflated byte stands for more.
_MOST_COMPRESSION = 1032

_BLOCK = 'Transformer/encoderblock_'
_STACK = 'Transformer/encoderblock/'
# Where programs have put the class token's and the patches' position embeddings, newest first.
_POSITIONS = ('pos_embedding', 'Transformer/pos_embedding', 'Transformer/posembed_input/pos_embedding')

# V-MoE's names in big_vision's words.
_VMOE = (
    (r'^Encoder/', 'Transformer/'),
    (r'/SelfAttention/', '/MultiHeadDotProductAttention_0/'),
    (r'/Moe/Mlp/', '/MlpBlock_0/expert/'),
    (r'/Moe/Router/dense/kernel$', '/MlpBlock_0/router/router_weights/w/kernel'),
    (r'/Mlp/', '/MlpBlock_0/'),
    (r'^MapHead/(MultiHeadDotProductAttention|LayerNorm)/', r'MAPHead_0/\1_0/'),
    (r'^MapHead/Mlp/', 'MAPHead_0/MlpBlock_0/'),
    (r'^MapHead/', 'MAPHead_0/'),
)
# Before linen, flax numbered a block's modules through: LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3.
_PRE_LINEN = (
    (r'/MultiHeadDotProductAttention_1/', '/MultiHeadDotProductAttention_0/'),
    (r'/LayerNorm_2/', '/LayerNorm_1/'),
    (r'/MlpBlock_3/', '/MlpBlock_0/'),
)

_ATTENTION = r'MultiHeadDotProductAttention_0/(query|key|value|out)/(kernel|bias)'
_MLP = r'MlpBlock_0/(expert/)?Dense_[01]/(kernel|bias)'
OUR_NAMES = re.compile(
    r'(embedding|pre_logits|head)/(kernel|bias)|pos_embedding|cls'
    r'|Transformer/encoder_norm/(scale|bias)'
    rf'|{_BLOCK}\d+/(LayerNorm_[01]/(scale|bias)|{_ATTENTION}|{_MLP}|MlpBlock_0/router/router_weights/w/kernel)'
    rf'|MAPHead_0/(probe|LayerNorm_0/(scale|bias)|{_ATTENTION}|{_MLP})'
)

# Fields of our model: all three programs use flax.linen's defaults.
FACTS = {'gelu': 'tanh', 'norm_epsilon': 1e-6}


class NpzReader(arrays.ArrayReader):
    """A lazy view of a ViT in an `.npz` file; see `upcycle.checkpoints.Reader`.

    Args:
        file: the file.
        subtree: which part of it is the ViT, such as 'img' of a SigLIP checkpoint.

    Raises:
        UserError: it is no zip archive, holds something other than arrays, or arrays that no ViT of ours has.
    """

    format = 'vit_npz'

    def __init__(self, file: epath.Path, subtree: str = ''):
        stored, self._metadata = _members(file)
        params, step, self._left_out = _parameters(file, stored, subtree)
        sources = {f'params/{name}': source for name, source in _ours(file, params).items()}
        super().__init__(file, sources if step is None else {'step': step, **sources})

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The family, what the layout says of the model, and what of the file is not read; all of ours, where we wrote it."""
        return self._metadata or {'family': 'vit', 'facts': FACTS, 'not_read': self._left_out}


class _Archive:
    """A zip file, opened once in each thread: members of one `ZipFile` disturb each other where threads open or seek them (in
    Python 3.12.1, whose `_SharedFile.seek` goes on from wherever another left the file)."""

    def __init__(self, file: epath.Path):
        self._file = file
        self._local = threading.local()

    @property
    def zip(self) -> zipfile.ZipFile:
        """This thread's."""
        if not hasattr(self._local, 'zip'):
            self._local.zip = zipfile.ZipFile(self._file.open('rb'))
        return self._local.zip


@dataclasses.dataclass(frozen=True)
class _Member:
    """One `.npy` file of the archive, a `Lazy` array."""

    archive: _Archive
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    stored_dtype: np.dtype
    fortran_order: bool
    header_bytes: int

    @property
    def dtype(self) -> np.dtype:
        # NumPy has no name for bfloat16 and stores two bytes of nothing in particular.
        return np.dtype(ml_dtypes.bfloat16) if self.stored_dtype == np.dtype('V2') else self.stored_dtype

    def read(self, region: arrays.Region) -> np.ndarray:
        # A layer of a stack lies in one piece.
        if region and not self.fortran_order and self.shape and all(part == slice(None) for part in region[1:]):
            start, stop, step = region[0].indices(self.shape[0])
            if step == 1:
                row = math.prod(self.shape[1:]) * self.dtype.itemsize
                return self._bytes(start * row, (stop - start) * row).reshape(stop - start, *self.shape[1:])
        whole = self._bytes(0, self._size)
        shaped = whole.reshape(self.shape[::-1]).T if self.fortran_order else whole.reshape(self.shape)
        return np.asarray(shaped[region], order='C')

    def _bytes(self, start: int, count: int) -> np.ndarray:
        out = np.empty(count, np.uint8)
        view, done = memoryview(out), 0
        if count < self._size:
            _ = self._is_whole
        with self.archive.zip.open(self.info) as file:
            # Read and not sought, because zipfile compares a checksum only for a member that is read from end to end.
            file.read(self.header_bytes)
            if start:
                file.seek(self.header_bytes + start)
            while done < count:
                got = file.readinto(view[done:])
                if not got:
                    raise ValueError(f'{count - done} bytes are missing')
                done += got
        return out.view(self.dtype)

    @property
    def _size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @functools.cached_property
    def _is_whole(self) -> bool:
        """Reads the whole member once, for its checksum, before parts of it are believed.

        Raises:
            zipfile.BadZipFile: the checksum differs.
        """
        with self.archive.zip.open(self.info) as file:
            while file.read(1 << 20):
                pass
        return True


def _members(file: epath.Path) -> tuple[dict[str, _Member], dict[str, Any] | None]:
    """The arrays of the archive by name, from their headers alone, and our metadata if it has any."""
    members: dict[str, _Member] = {}
    metadata = None
    try:
        archive = _Archive(file)
        size = file.stat().length
        for info in archive.zip.infolist():
            if info.compress_size > size or info.file_size > _MOST_COMPRESSION * (info.compress_size + 1):
                raise UserError(
                    f'{info.filename} of {file} claims {info.file_size} bytes, and the file has {size}: copy the file again.'
                )
            name = info.filename.removesuffix('.npy')
            if name in members:
                raise UserError(f'{file} holds two arrays named {name}.')
            if name == METADATA:
                metadata = arrays.checked_metadata(str(file), json.loads(archive.zip.read(info)))
            else:
                members[name] = _header(file, archive, info)
    except (*arrays.DAMAGE, RecursionError) as error:
        raise UserError(
            f'{file} is not a zip archive of arrays (.npz), or is damaged ({error}); nothing in it was unpickled.'
        ) from error
    return members, metadata


def _header(file: epath.Path, archive: _Archive, info: zipfile.ZipInfo) -> _Member:
    name = info.filename.removesuffix('.npy')
    try:
        with archive.zip.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = parse(stream)
            header_bytes = stream.tell()
    except arrays.DAMAGE as error:
        raise UserError(f'{name} of {file} is not an array, or is damaged ({error}): copy the file again.') from error
    if dtype.hasobject:
        raise UserError(f'{name} of {file} holds pickled Python objects, which are never opened.')
    if header_bytes + math.prod(shape) * dtype.itemsize != info.file_size:
        raise UserError(
            f'{name} of {file} should be {dtype}{list(shape)} and has {info.file_size - header_bytes} bytes: '
            'copy the file again.'
        )
    return _Member(archive, info, shape, dtype, fortran_order, header_bytes)


def _parameters(
    file: epath.Path, stored: Mapping[str, _Member], subtree: str
) -> tuple[dict[str, _Member], _Member | None, dict[str, str]]:
    """The parameters without what stands before their names, the step if it is there, and what is left out and why."""

    def below(prefix: str, names: Mapping[str, _Member]) -> dict[str, _Member]:
        return {name.removeprefix(prefix): member for name, member in names.items() if name.startswith(prefix)}

    # In this order: optax's `opt/` lies beside `params/`, flax's old optimizer held the parameters itself.
    prefix = next((p for p in ('params/', 'opt/target/') if any(n.startswith(p) for n in stored)), '')
    step = next((stored[name] for name in ('step', 'opt/state/step') if name in stored), None)
    params = below(prefix, stored)
    if not prefix:
        params.pop('step', None)
    if subtree:
        params = below(subtree.strip('/') + '/', params) or below(subtree.strip('/') + '/', stored)
        # The subtree may itself be a checkpoint.
        params = below('params/', params) or params
        if not params:
            tops = sorted({name.split('/')[0] for name in stored})
            raise UserError(f'{file} has nothing below {subtree!r}, only {", ".join(tops)}.')
    read = {id(member) for member in params.values()} | {id(step)}
    left_out = {
        name: 'not a parameter of the ViT' if subtree else 'the optimizer state of another program'
        for name, member in stored.items()
        if id(member) not in read
    }
    return params, step, left_out


def _ours(file: epath.Path, params: Mapping[str, _Member]) -> dict[str, arrays.Lazy]:
    """The parameters under our names."""
    out: dict[str, arrays.Lazy] = {}
    came_from: dict[str, str] = {}

    def add(name: str, stored: str, source: arrays.Lazy) -> None:
        if name in came_from:
            raise UserError(f'{file} has two arrays for {name}: {came_from[name]} and {stored}.')
        came_from[name], out[name] = stored, source

    positions = [name for stored in params if (name := _rename(stored, params)) in _POSITIONS]
    for stored, member in params.items():
        name = _rename(stored, params)
        if name in _POSITIONS:
            if len(positions) > 1:
                raise UserError(f'{file} has two arrays for pos_embedding: {" and ".join(positions)}.')
            patches, of_class = _split_positions(file, name, member, params.get('cls'))
            add('pos_embedding', stored, patches)
            if of_class is not None:
                out['cls'] = of_class
        elif name == 'cls':
            came_from[name] = stored
            out.setdefault('cls', member)
        elif name.startswith(_STACK):
            for layer in range(member.shape[0] if member.shape else 0):
                inside = name.removeprefix(_STACK)
                add(f'{_BLOCK}{layer}/{inside}', stored, _layer(member, layer))
        else:
            add(name, stored, member)
    unknown = [came_from[name] for name in out if not OUR_NAMES.fullmatch(name)]
    if unknown:
        listing = ', '.join(grouped(unknown, 5))
        raise UserError(
            f'{file} holds arrays that have no counterpart in our ViT: {listing}. If the ViT is a part of it, name that part: '
            f'{file}:PART.'
        )
    return out


def _rename(stored: str, params: Mapping[str, Any]) -> str:
    name = stored
    if name.startswith(('Encoder/', 'MapHead/')):
        for pattern, replacement in _VMOE:
            name = re.sub(pattern, replacement, name)
    if name.startswith((_STACK, _BLOCK)):
        for pattern, replacement in _PRE_LINEN:
            name = re.sub(pattern, replacement, name)
    # While ViT-G was developed, the attention pooling had no module of its own.
    if 'probe' in params and name.split('/')[0] in (
        'probe',
        'MlpBlock_0',
        'MultiHeadDotProductAttention_0',
        'LayerNorm_0',
    ):
        name = f'MAPHead_0/{name}'
    return name


def _split_positions(
    file: epath.Path, name: str, member: _Member, cls: _Member | None
) -> tuple[arrays.Lazy, arrays.Lazy | None]:
    """Position embeddings of the patches, and the class token with its own added, where they lie in one array."""
    if len(member.shape) != 3 or member.shape[0] != 1:
        raise UserError(f'{name} of {file} is {list(member.shape)}, where (1, positions, width) belongs.')
    if name == 'pos_embedding' or cls is None:
        return member, None
    _, rows, width = member.shape
    if cls.shape != (1, 1, width):
        raise UserError(f'cls of {file} is {list(cls.shape)}, where (1, 1, {width}) belongs.')
    # Between the two layouts, big_vision kept the array where it was and left the token out of it.
    if name == 'Transformer/pos_embedding' and math.isqrt(rows) ** 2 == rows:
        return member, None
    return arrays.token_position_into_token(cls, member)


def _layer(member: _Member, layer: int) -> arrays.Lazy:
    return arrays.Derived(member.shape[1:], member.dtype, (member,), lambda stack: stack[0], (slice(layer, layer + 1),))


class NpzWriter:
    """A ViT, dense or MoE, in one file with big_vision's names of today; see `writing.Writer`. A cut write begins again."""

    def __init__(self, path: epath.Path, leaves: writing.Leaves):
        if path.suffix != '.npz':
            raise UserError(f'{path} must end in .npz: name another --to.')
        self.path = os.fspath(path)
        self.left_out = {'rng': 'a file of parameters has no random key'} if 'rng' in leaves else {}
        self._leaves = {name: leaf for name, leaf in leaves.items() if name not in self.left_out}
        for name in self._leaves:
            if name != 'step' and not (
                name.startswith('params/') and OUR_NAMES.fullmatch(name.removeprefix('params/'))
            ):
                way_out = (
                    ': leave the optimizer state out with --optimizer_state=none'
                    if name.startswith('opt_state/')
                    else ''
                )
                raise UserError(f'{name} has no counterpart in vit_npz, which holds the parameters of a ViT{way_out}.')
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self._leaves.values())
        self._staging = writing.Staging(path, outputs.Kind.NEW_FILE, size)
        self._finished = False
        self._file = self._staging.path.open('wb')
        self._archive = zipfile.ZipFile(self._file, 'w', zipfile.ZIP_STORED)
        self._member: Any = None

    def todo(self) -> dict[str, list[arrays.Region]]:
        """See `writing.Writer`; parts come in this order."""
        return {name: writing.parts(name, leaf) for name, leaf in self._leaves.items()}

    def write(self, name: str, region: arrays.Region, value: np.ndarray) -> None:
        """See `writing.Writer`."""
        leaf = self._leaves[name]
        # As NumPy itself writes bfloat16.
        stored = 'V2' if leaf.dtype.name == 'bfloat16' else leaf.dtype
        with writing.not_refused(self._staging.path, name):
            if region == writing.WHOLE or region[0].start == 0:
                self._member = self._archive.open(f'{name}.npy', 'w', force_zip64=True)
                header = {
                    'descr': np.lib.format.dtype_to_descr(np.dtype(stored)),
                    'fortran_order': False,
                    'shape': leaf.shape,
                }
                np.lib.format.write_array_header_1_0(self._member, header)
            self._member.write(np.asarray(value, order='C').reshape(-1).view(np.uint8).data)
            if region == writing.WHOLE or region[0].stop == leaf.shape[0]:
                self._member.close()

    def finish(self, metadata: Mapping[str, Any], check: writing.Check = lambda reader: None) -> None:
        """See `writing.Writer`."""
        with writing.not_refused(self._staging.path):
            self._archive.writestr(METADATA, json.dumps(dict(metadata)))
            self._archive.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        check(NpzReader(self._staging.path))
        self._staging.publish()
        self._finished = True

    def close(self) -> None:
        """See `writing.Writer`."""
        if not self._finished:
            self.discard()

    def discard(self) -> None:
        """See `writing.Writer`."""
        # A full disk takes no end of the archive either.
        for part in filter(None, (self._member, self._archive, self._file)):
            with contextlib.suppress(OSError, ValueError):
                part.close()
        self._staging.discard()
        self._finished = True
