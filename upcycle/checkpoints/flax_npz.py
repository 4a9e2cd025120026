"""ViT checkpoints in `.npz` files: the layouts of vision_transformer, big_vision and V-MoE, read one array at a time.

Names are ours in every layout: big_vision's names of today with layers unstacked,
`params/Transformer/encoderblock_0/MlpBlock_0/...`.
Layouts matched: vision_transformer/vit_jax/checkpoint.py and models_vit.py; big_vision/models/vit.py (`fix_old_checkpoints`)
and utils.py (`load_params`, `recover_dtype`); vmoe/nn/vit_moe.py; flax's `convert_pre_linen` for the numbering of layers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from upcycle import outputs
from upcycle.checkpoints import arrays, class_token, npz, staging, views, writing
from upcycle.errors import UserError
from upcycle.leaf_names import grouped

_BLOCK = 'Transformer/encoderblock_'
_STACK = 'Transformer/encoderblock/'
# Names of the position embeddings, newest first.
_POSITIONS = ('pos_embedding', 'Transformer/pos_embedding', 'Transformer/posembed_input/pos_embedding')

# From V-MoE's names to big_vision's.
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
# Before linen, flax numbered all modules of a block: LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3.
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

# Facts of the model: all three programs use flax.linen's defaults.
FACTS = {'gelu': 'tanh', 'norm_epsilon': 1e-6}


class NpzReader(arrays.ArrayReader):
    """A lazy view of a ViT in an `.npz` file; see `upcycle.checkpoints.Reader`.

    Args:
      file: the file.
      subtree: the part that is the ViT, such as 'img' in a SigLIP checkpoint.

    Raises:
      UserError: the file is not a zip archive of arrays, or holds arrays that our ViT does not have.
    """

    format = 'vit_npz'

    def __init__(self, file: epath.Path, subtree: str = ''):
        stored, self._metadata = npz.read_members(file)
        params, step, self._left_out = _parameters(file, stored, subtree)
        sources = {f'params/{name}': source for name, source in _ours(file, params).items()}
        super().__init__(file, sources if step is None else {'step': step, **sources})

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Our metadata if we wrote the file; else the family, the facts, and the arrays that are not read."""
        return self._metadata or {'family': 'vit', 'facts': FACTS, 'not_read': self._left_out}


def _parameters(
    file: epath.Path, stored: Mapping[str, npz.Member], subtree: str
) -> tuple[dict[str, npz.Member], npz.Member | None, dict[str, str]]:
    """Returns the parameters without their prefix, the step or None, and the reason why each other array is left out."""

    def below(prefix: str, names: Mapping[str, npz.Member]) -> dict[str, npz.Member]:
        return {name.removeprefix(prefix): member for name, member in names.items() if name.startswith(prefix)}

    # In this order: optax's `opt/` lies next to `params/`; flax's old optimizer contained the parameters.
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
            tops = ', '.join(sorted({name.split('/')[0] for name in stored}))
            raise UserError(f'{file} has no arrays below {subtree!r}, only below {tops}.')
    read = {id(member) for member in params.values()} | {id(step)}
    left_out = {
        name: 'not a parameter of the ViT' if subtree else 'the optimizer state of another program'
        for name, member in stored.items()
        if id(member) not in read
    }
    return params, step, left_out


def _ours(file: epath.Path, params: Mapping[str, npz.Member]) -> dict[str, views.Lazy]:
    """Returns the parameters under our names."""
    out: dict[str, views.Lazy] = {}
    stored_names: dict[str, str] = {}

    def add(name: str, stored: str, source: views.Lazy) -> None:
        if name in stored_names:
            raise UserError(f'{file} has two arrays for {name}: {stored_names[name]} and {stored}.')
        stored_names[name], out[name] = stored, source

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
            stored_names[name] = stored
            out.setdefault('cls', member)
        elif name.startswith(_STACK):
            for layer in range(member.shape[0] if member.shape else 0):
                inside = name.removeprefix(_STACK)
                add(f'{_BLOCK}{layer}/{inside}', stored, views.Layer(member, 0, layer))
        else:
            add(name, stored, member)
    if unknown := [stored_names[name] for name in out if not OUR_NAMES.fullmatch(name)]:
        listing = ', '.join(grouped(unknown, 5))
        raise UserError(
            f'{file} holds arrays that our ViT does not have: {listing}. If the ViT is a subtree, name it: {file}:SUBTREE.'
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
    # In checkpoints from the development of ViT-G, attention pooling has no module.
    of_pooling = ('probe', 'MlpBlock_0', 'MultiHeadDotProductAttention_0', 'LayerNorm_0')
    if 'probe' in params and name.split('/')[0] in of_pooling:
        name = f'MAPHead_0/{name}'
    return name


def _split_positions(
    file: epath.Path, name: str, member: npz.Member, cls: npz.Member | None
) -> tuple[views.Lazy, views.Lazy | None]:
    """Splits position embeddings: those of the patches, and the class token plus its position if the array includes one."""
    if len(member.shape) != 3 or member.shape[0] != 1:
        raise UserError(f'{name} of {file} is {list(member.shape)}: it must be (1, positions, width).')
    if name == 'pos_embedding' or cls is None:
        return member, None
    _, rows, width = member.shape
    if cls.shape != (1, 1, width):
        raise UserError(f'cls of {file} is {list(cls.shape)}: it must be (1, 1, {width}).')
    # For a while, big_vision used the old name for an array without the token's position.
    if name == 'Transformer/pos_embedding' and math.isqrt(rows) ** 2 == rows:
        return member, None
    return class_token.without_own_position(cls, member)


class NpzWriter(staging.StagedWriter):
    """Writes a ViT, dense or MoE, to one file with big_vision's names of today."""

    def __init__(self, path: epath.Path, leaves: writing.Leaves):
        if path.suffix != '.npz':
            raise UserError(f'{path} must end in .npz: name another --to.')
        super().__init__(path, leaves)
        for name in self._leaves:
            top, _, rest = name.partition('/')
            if name != 'step' and not (top == 'params' and OUR_NAMES.fullmatch(rest)):
                raise writing.no_counterpart(name, 'vit_npz', 'the parameters of a ViT')
        self._file = self._stage(outputs.Kind.NEW_FILE).open('wb')
        self._archive = zipfile.ZipFile(self._file, 'w', zipfile.ZIP_STORED)
        self._member: Any = None

    def write(self, name: str, region: views.Region, value: np.ndarray) -> None:
        """See `writing.Writer`."""
        leaf = self._leaves[name]
        # NumPy writes bfloat16 as V2.
        stored = np.dtype('V2' if leaf.dtype.name == 'bfloat16' else leaf.dtype)
        with writing.not_refused(self._staging.path, name):
            if region == writing.WHOLE or region[0].start == 0:
                self._member = self._archive.open(f'{name}.npy', 'w', force_zip64=True)
                descr = np.lib.format.dtype_to_descr(stored)
                header = {'descr': descr, 'fortran_order': False, 'shape': leaf.shape}
                np.lib.format.write_array_header_1_0(self._member, header)
            self._member.write(np.asarray(value, order='C').reshape(-1).view(np.uint8).data)
            if region == writing.WHOLE or region[0].stop == leaf.shape[0]:
                self._member.close()

    def finish(self, metadata: Mapping[str, Any], check: writing.Check = lambda reader: None) -> None:
        """See `writing.Writer`."""
        with writing.not_refused(self._staging.path):
            self._archive.writestr(npz.METADATA, json.dumps(dict(metadata)))
            self._archive.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._publish(check, NpzReader(self._staging.path))

    def _close_files(self) -> None:
        for part in filter(None, (self._member, self._archive, self._file)):
            with contextlib.suppress(OSError, ValueError):
                part.close()
