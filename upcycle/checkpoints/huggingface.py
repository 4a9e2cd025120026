"""Hugging Face checkpoints of T5 (1.0, 1.1, Flan, mT5, umT5) and ViT in safetensors files, read and written without PyTorch.

A safetensors file is a JSON header (names, types, shapes, offsets) and the arrays' bytes; a large model has several files and an
index. `config.json` says what shapes do not, and `preprocessor_config.json` how a ViT's images were made. Linear layers hold
(out, in) there and (in, out) here, and a head's axes are joined. Layouts matched: modeling_t5.py, modeling_(u)mt5.py,
modeling_vit.py, conversion_mapping.py, configuration_utils.py and `_get_resolved_checkpoint_files` of transformers 4 and 5; the
safetensors format's own description.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from upcycle import outputs, schema, warning
from upcycle.checkpoints import arrays, foreign, writing
from upcycle.errors import UserError
from upcycle.leaf_names import grouped

SINGLE, INDEX, CONFIG = 'model.safetensors', 'model.safetensors.index.json', 'config.json'

_DTYPES = {
    'F64': np.dtype('float64'),
    'F32': np.dtype('float32'),
    'F16': np.dtype('float16'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'I64': np.dtype('int64'),
    'I32': np.dtype('int32'),
    'I16': np.dtype('int16'),
    'I8': np.dtype('int8'),
    'U8': np.dtype('uint8'),
    'BOOL': np.dtype('bool'),
}
_MAX_HEADER = 100 << 20
_SHARD_BYTES = 5 << 30

# What a file of some other kind is, by its name.
_ADAPTER = 'adapter_config.json'
_ADAPTER_FILES = 'adapter_model.'
_PICKLES = re.compile(r'pytorch_model.*\.bin(\.index\.json)?|.*\.(pt|pth|ckpt|pkl)')
_OTHER_PROGRAMS = re.compile(
    r'(tf_model.*\.h5|flax_model.*\.msgpack|.*\.gguf|model.*\.onnx|.*\.ckpt-\d+\.index'
    r'|global_step\d+|zero_to_fp32\.py|pytorch_model_fsdp_\d+|.*\.distcp)'  # DeepSpeed, FSDP
)
NAMES = re.compile(r'.*\.safetensors(\.index(\.\w+)?\.json)?')  # arrays, or an index, which may be of a variant
_SHARD = re.compile(r'.*-\d{5}-of-\d{5}\.safetensors')

# What torch.compile, DistributedDataParallel, FSDP, checkpointing of activations and Lightning put into a name.
_WRAPPERS = re.compile(
    r'(^model\.|(?<![^.])(_orig_mod|module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)'
)
# A ViT's names in transformers 5, as conversion_mapping.py renames them, and those that it writes unless asked not to.
_VIT_5 = (
    (r'^(vit\.)?layers\.(\d+)\.', r'\1encoder.layer.\2.'),
    (r'\.attention\.(?:attention\.)?q_proj\.', '.attention.attention.query.'),
    (r'\.attention\.(?:attention\.)?k_proj\.', '.attention.attention.key.'),
    (r'\.attention\.(?:attention\.)?v_proj\.', '.attention.attention.value.'),
    (r'\.attention\.o_proj\.', '.attention.output.dense.'),
    (r'\.mlp\.fc1\.', '.intermediate.dense.'),
    (r'\.mlp\.fc2\.', '.output.dense.'),
)
# What transformers leaves out as well (`_keys_to_ignore_on_load_unexpected`), and why.
_NOT_READ = {
    'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight': 'a table of early T5 1.0 files that nothing uses',
    'vit.embeddings.mask_token': 'the token of masked patches, which classification does not use',
    'embeddings.mask_token': 'the token of masked patches, which classification does not use',
}
_POOLER = 'part of a layer that a classifier of transformers does not use'
_DEPTHS = {
    'num_layers': r'encoder\.block\.(\d+)\.',
    'num_decoder_layers': r'decoder\.block\.(\d+)\.',
    'num_hidden_layers': r'(?:vit\.)?encoder\.layer\.(\d+)\.',
}
# Whose sentinels are not T5's, by `model_type` and `vocab_size`.
_OWN_VOCABULARIES = {('mt5', 250112): 'mt5', ('umt5', 256384): 'umt5'}
_T5_CLASSES = {'t5': 'T5', 'mt5': 'MT5', 'umt5': 'UMT5'}


@dataclasses.dataclass(frozen=True)
class _Turn:
    """How an array lies here and there."""

    to_ours: Callable[[np.ndarray, int], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


_TURNS = {
    'same': _Turn(lambda x, heads: x, lambda x: x),
    'linear': _Turn(lambda x, heads: x.T, lambda x: x.T),
    # (H N, D) <-> (D, H, N) and (H N) <-> (H, N)
    'to_heads': _Turn(lambda x, heads: x.T.reshape(x.shape[1], heads, -1), lambda x: x.reshape(x.shape[0], -1).T),
    'heads_bias': _Turn(lambda x, heads: x.reshape(heads, -1), lambda x: x.reshape(-1)),
    # (D, H N) <-> (H, N, D)
    'from_heads': _Turn(lambda x, heads: x.T.reshape(heads, -1, x.shape[0]), lambda x: x.reshape(-1, x.shape[-1]).T),
    # (D, channels, P, P) <-> (P, P, channels, D)
    'patches': _Turn(lambda x, heads: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
}

Table = dict[str, tuple[str, str]]  # their name: (ours below `params/`, turn)


def _t5_table(encoder_layers: int, decoder_layers: int, biases_in_every_layer: bool) -> Table:
    """`biases_in_every_layer`: as in umT5, where T5 has the position biases of a stack in its first layer."""
    table = {
        'shared.weight': ('token_embedder/embedding', 'same'),
        'lm_head.weight': ('decoder/logits_dense/kernel', 'linear'),
    }
    blocks = {
        'encoder': (('SelfAttention', 'attention', 'pre_attention_layer_norm'),),
        'decoder': (
            ('SelfAttention', 'self_attention', 'pre_self_attention_layer_norm'),
            ('EncDecAttention', 'encoder_decoder_attention', 'pre_cross_attention_layer_norm'),
        ),
    }
    for stack, count in (('encoder', encoder_layers), ('decoder', decoder_layers)):
        for i in range(count if biases_in_every_layer else 1):
            attention = f'{stack}.block.{i}.layer.0.SelfAttention'
            ours = f'{stack}/layers_{i}' if biases_in_every_layer else stack
            table[f'{attention}.relative_attention_bias.weight'] = (f'{ours}/relpos_bias/rel_embedding', 'linear')
        table[f'{stack}.final_layer_norm.weight'] = (f'{stack}/{stack}_norm/scale', 'same')
        for i in range(count):
            theirs, ours = f'{stack}.block.{i}.layer', f'{stack}/layers_{i}'
            for j, (their_name, our_name, norm) in enumerate(blocks[stack]):
                for letter, part in (('q', 'query'), ('k', 'key'), ('v', 'value'), ('o', 'out')):
                    table[f'{theirs}.{j}.{their_name}.{letter}.weight'] = (f'{ours}/{our_name}/{part}/kernel', 'linear')
                table[f'{theirs}.{j}.layer_norm.weight'] = (f'{ours}/{norm}/scale', 'same')
            j = len(blocks[stack])
            for matrix in ('wi', 'wi_0', 'wi_1', 'wo'):
                table[f'{theirs}.{j}.DenseReluDense.{matrix}.weight'] = (f'{ours}/mlp/{matrix}/kernel', 'linear')
            table[f'{theirs}.{j}.layer_norm.weight'] = (f'{ours}/pre_mlp_layer_norm/scale', 'same')
    return table


def _vit_table(layers: int, prefix: str) -> Table:
    """`prefix` is 'vit.' below a classification head, and empty in a bare model."""
    table = {
        f'{prefix}embeddings.patch_embeddings.projection.weight': ('embedding/kernel', 'patches'),
        f'{prefix}embeddings.patch_embeddings.projection.bias': ('embedding/bias', 'same'),
        f'{prefix}embeddings.position_embeddings': ('pos_embedding', 'same'),
        f'{prefix}embeddings.cls_token': ('cls', 'same'),
        f'{prefix}layernorm.weight': ('Transformer/encoder_norm/scale', 'same'),
        f'{prefix}layernorm.bias': ('Transformer/encoder_norm/bias', 'same'),
        f'{prefix}pooler.dense.weight': ('pre_logits/kernel', 'linear'),
        f'{prefix}pooler.dense.bias': ('pre_logits/bias', 'same'),
        'classifier.weight': ('head/kernel', 'linear'),
        'classifier.bias': ('head/bias', 'same'),
    }
    for i in range(layers):
        theirs, ours = f'{prefix}encoder.layer.{i}', f'Transformer/encoderblock_{i}'
        attention = f'{ours}/MultiHeadDotProductAttention_0'
        for part in ('query', 'key', 'value'):
            table[f'{theirs}.attention.attention.{part}.weight'] = (f'{attention}/{part}/kernel', 'to_heads')
            table[f'{theirs}.attention.attention.{part}.bias'] = (f'{attention}/{part}/bias', 'heads_bias')
        table[f'{theirs}.attention.output.dense.weight'] = (f'{attention}/out/kernel', 'from_heads')
        table[f'{theirs}.attention.output.dense.bias'] = (f'{attention}/out/bias', 'same')
        for their_name, our_name in (('intermediate.dense', 'Dense_0'), ('output.dense', 'Dense_1')):
            table[f'{theirs}.{their_name}.weight'] = (f'{ours}/MlpBlock_0/{our_name}/kernel', 'linear')
            table[f'{theirs}.{their_name}.bias'] = (f'{ours}/MlpBlock_0/{our_name}/bias', 'same')
        for their_name, our_name in (('layernorm_before', 'LayerNorm_0'), ('layernorm_after', 'LayerNorm_1')):
            table[f'{theirs}.{their_name}.weight'] = (f'{ours}/{our_name}/scale', 'same')
            table[f'{theirs}.{their_name}.bias'] = (f'{ours}/{our_name}/bias', 'same')
    return table


class HuggingFaceReader(arrays.ArrayReader):
    """A lazy view of a folder of safetensors; see `upcycle.checkpoints.Reader`.

    Raises:
        UserError: the files are not whole, or hold another model than a T5 or a ViT.
    """

    format = 'huggingface'

    def __init__(self, path: epath.Path):
        folder = path if path.is_dir() else path.parent
        if path.name.startswith(_ADAPTER_FILES):
            _refuse_adapter(path)
        if not (folder / CONFIG).exists():
            raise UserError(
                f'{folder} has no {CONFIG}, which says what the arrays do not: copy that of the model there, '
                "as transformers' save_pretrained does."
            )
        self._config = foreign.read_config(folder / CONFIG)
        file = _which_file(folder, None if path == folder else path.name, self._config.get('transformers_weights'))
        stored, self._notes = _read_files(file)
        stored = _renamed(folder, stored, self._config['model_type'])
        self._left_out = {name: _NOT_READ[name] for name in stored if name in _NOT_READ}
        if 'classifier.weight' in stored:
            self._left_out |= {name: _POOLER for name in stored if name.startswith('vit.pooler.')}
        stored = {name: tensor for name, tensor in stored.items() if name not in self._left_out}
        _require_depth(folder, self._config, stored)
        read = {'t5': _read_t5, 'vit': _read_vit}[foreign.family(self._config)]
        sources, self._facts = read(folder, self._config, stored)
        _require_sizes(folder, self._config, sources)
        foreign.check_images(folder, self._config)
        step = self._notes.get('step', '')
        named: dict[str, arrays.Source] = {f'params/{name}': source for name, source in sources.items()}
        if re.fullmatch('[0-9]{1,10}', step) and int(step) < 2**31:
            named['step'] = np.asarray(int(step), np.int32)
        super().__init__(folder, named)

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The family, what the configuration says of the model, and what of the files is not read."""
        found = {'family': foreign.family(self._config), 'facts': self._facts, 'model_type': self._config['model_type']}
        # ByT5's configuration is that of a T5, but for its tokenizer.
        is_byt5 = self._config.get('tokenizer_class') == 'ByT5Tokenizer'
        kind = (
            'byt5' if is_byt5 else _OWN_VOCABULARIES.get((self._config['model_type'], self._config.get('vocab_size')))
        )
        return {
            **found,
            **({'sentinels': kind} if kind else {}),
            **({'not_read': self._left_out} if self._left_out else {}),
        }


def find(folder: epath.Path) -> bool:
    """Whether a folder holds safetensors."""
    return any((folder / name).exists() for name in (SINGLE, INDEX))


def refuse_other_files(folder: epath.Path) -> None:
    """Says what a folder without `model.safetensors` and its index holds instead, or what another file is.

    Raises:
        UserError: an adapter, files of another name, or of another program.
    """
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else [folder.name]
    folder = folder if folder.is_dir() else folder.parent
    if links := [name for name in (SINGLE, INDEX) if name in names and not (folder / name).exists()]:
        raise UserError(
            f'{folder / links[0]} is a link to a file that is not there: copy the checkpoint again, with what its links lead to.'
        )
    if any(name == _ADAPTER or name.startswith(_ADAPTER_FILES) for name in names):
        _refuse_adapter(folder)
    safetensors = [name for name in names if NAMES.fullmatch(name)]
    indexes = [name for name in safetensors if name.endswith('.json')]
    if found := indexes or [name for name in safetensors if not _SHARD.fullmatch(name)]:
        raise UserError(f'{folder} holds {found[0]} and no {SINGLE}: name the file itself, {folder / found[0]}.')
    if safetensors:
        raise UserError(f'{folder} holds {safetensors[0]} and no {INDEX}: copy the checkpoint again, with its index.')
    if pickles := [name for name in names if _PICKLES.fullmatch(name)]:
        raise UserError(
            f'{folder} holds {pickles[0]}, a pickle, which is never opened: save the model again with '
            "transformers' save_pretrained, which writes safetensors."
        )
    if others := [name for name in names if _OTHER_PROGRAMS.fullmatch(name)]:
        raise UserError(
            f'{folder} holds {others[0]}, which is not read: save the model again with '
            "transformers' save_pretrained, which writes safetensors."
        )


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One array of a safetensors file, a `Lazy` array."""

    file: epath.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # from the file's beginning

    def read(self, region: arrays.Region) -> np.ndarray:
        # Leading rows lie in one piece.
        rows = range(self.shape[0]) if self.shape else range(1)
        inner = region
        if region and self.shape and region[0].indices(self.shape[0])[2] == 1:
            rows = rows[region[0]]
            inner = (slice(None), *region[1:])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        out = np.empty(len(rows) * row_bytes, np.uint8)
        with self.file.open('rb') as file:
            file.seek(self.offset + rows.start * row_bytes)
            view, done = memoryview(out), 0
            while done < len(out):
                data = file.read(min(len(out) - done, 64 << 20))
                if not data:
                    raise ValueError(f'{len(out) - done} bytes are missing')
                view[done : done + len(data)] = data
                done += len(data)
        shaped = out.view(self.dtype).reshape((len(rows), *self.shape[1:]) if self.shape else ())
        return np.asarray(shaped[inner], order='C')


def _refuse_adapter(path: epath.Path) -> None:
    raise UserError(
        f"{path} is an adapter and no model: merge it into its model with peft's merge_and_unload, and save that with "
        'save_pretrained.'
    )


def _which_file(folder: epath.Path, named: str | None, by_config: Any) -> epath.Path:
    """The file that counts, of arrays or an index, in the order of transformers' `_get_resolved_checkpoint_files`.

    Args:
        folder: of the model.
        named: the file that the user named; None: the folder.
        by_config: `transformers_weights` of the configuration.
    """
    if named is not None and not _SHARD.fullmatch(named):
        return folder / named
    if by_config is not None:
        if not arrays.is_plain_name(by_config) or not by_config.endswith(('.safetensors', '.safetensors.index.json')):
            raise UserError(
                f'{folder / CONFIG}: transformers_weights is {schema.shown(by_config)}, where the name of a safetensors file or '
                'its index belongs.'
            )
        return folder / by_config
    if (folder / _ADAPTER).exists():
        warning.once(f'{folder / _ADAPTER} is passed over: the model is read without its adapter.')
    if not (folder / SINGLE).exists():
        return folder / INDEX
    if (folder / INDEX).exists() and _indexed(folder / INDEX) != {SINGLE}:
        warning.once(
            f'{folder / INDEX} and its files are passed over: {SINGLE} counts, as in transformers. Name the index to read them.'
        )
    return folder / SINGLE


def _indexed(index: epath.Path) -> set[str]:
    """Files that an index names; none where it is damaged."""
    try:
        return set(arrays.read_json(index)['weight_map'].values())
    except (UserError, KeyError, TypeError, AttributeError):
        return set()


def _read_files(file: epath.Path) -> tuple[dict[str, _Tensor], dict[str, str]]:
    """The arrays of a model, in one file or in those of an index, and the notes in the (first) header."""
    if not file.name.endswith('.json'):
        return _read_header(file)
    folder, index = file.parent, file
    try:
        where = arrays.read_json(index, _refuse_twice)['weight_map']
        files = sorted(set(where.values()))
        plain = all(map(arrays.is_plain_name, files))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{index} is damaged ({error}): copy it again.') from error
    if not plain:
        raise UserError(f'{index} names files that do not lie beside it.')
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise UserError(
            f'{index} names {missing[0]}, which is not there: copy the checkpoint again, with all of its files.'
        )
    found: dict[str, _Tensor] = {}
    notes: dict[str, str] = {}
    for file in files:
        stored, more = _read_header(folder / file)
        for name, tensor in stored.items():
            if where.get(name) != file:
                instead = f'looks for in {where[name]}' if name in where else 'does not name'
                raise UserError(
                    f'{folder / file} holds {name}, which {index} {instead}: copy the checkpoint again, with its own index.'
                )
            found[name] = tensor
        notes = notes or more
    for name, file in where.items():
        if name not in found:
            raise UserError(
                f'{index} looks for {name} in {file}, which does not hold it: copy the checkpoint again, with its own index.'
            )
    return found, notes


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f'{min(name for name, count in counts.items() if count > 1)} is there twice')
    return found


def _read_header(file: epath.Path) -> tuple[dict[str, _Tensor], dict[str, str]]:
    try:
        size = file.stat().length
        with file.open('rb') as stream:
            length = int.from_bytes(start := stream.read(8), 'little')
            if start == b'version ':
                raise UserError(f'{file} is a pointer of Git LFS and not the file itself: run git lfs pull.')
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f'its header would be {length} bytes long')
            header = json.loads(stream.read(length), object_pairs_hook=_refuse_twice)
        notes = header.pop('__metadata__', {})
        if not schema.fits(notes, dict[str, str]):
            raise ValueError('its metadata is no dictionary of texts')
        found = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items()}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{file} is not a safetensors file, or is damaged ({error}): copy it again.') from error
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))):
        if tensor.offset != end:
            raise UserError(
                f'{name} of {file} begins at byte {tensor.offset}, where {end} follows from the others: copy it again.'
            )
        end = tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        if end > size:
            raise UserError(f'{name} of {file} ends at byte {end}, and the file has {size}: copy it again.')
    if end != size:
        raise UserError(f'{file} has {size - end} bytes that belong to no array: copy it again.')
    return found, notes


def _tensor(file: epath.Path, name: str, entry: Mapping[str, Any], start: int) -> _Tensor:
    dtype = _DTYPES.get(entry['dtype'])
    if dtype is None:
        raise UserError(f'{name} of {file} has the type {entry["dtype"]}, which is not read.')
    shape = tuple(int(axis) for axis in entry['shape'])
    begin, end = entry['data_offsets']
    if min((*shape, begin), default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(f'{name} of {file} should be {dtype}{list(shape)} and has {end - begin} bytes: copy it again.')
    return _Tensor(file, shape, dtype, start + begin)


def _renamed(folder: epath.Path, stored: Mapping[str, _Tensor], model_type: str) -> dict[str, _Tensor]:
    """The arrays by the names of transformers 4, without what wrappers put before them.

    Raises:
        UserError: the arrays are those of an adapter, or two have the same name then.
    """
    if adapters := [name for name in stored if re.search(r'(^|[._])lora_|\.base_layer\.|^base_model\.', name)]:
        raise UserError(
            f"{folder} holds an adapter that is not merged ({adapters[0]}): merge it with peft's merge_and_unload, and save the "
            'model again.'
        )
    out: dict[str, _Tensor] = {}
    came_from: dict[str, str] = {}
    for theirs, tensor in stored.items():
        name = theirs
        while (shorter := _WRAPPERS.sub('', name)) != name:
            name = shorter
        for pattern, replacement in _VIT_5 if model_type == 'vit' else ():
            name = re.sub(pattern, replacement, name)
        if name in out:
            raise UserError(f'{folder} has two arrays for {name}: {came_from[name]} and {theirs}.')
        out[name], came_from[name] = tensor, theirs
    return out


def _require_depth(folder: epath.Path, config: Mapping[str, Any], stored: Mapping[str, _Tensor]) -> None:
    """The configuration must have as many layers as the arrays."""
    for field, pattern in _DEPTHS.items():
        layers = {int(match[1]) for name in stored if (match := re.match(pattern, name))}
        if field in config and layers and config[field] != 1 + max(layers):
            raise UserError(f'{folder / CONFIG}: {field} is {config[field]}, and the arrays have {1 + max(layers)}.')


def _require_sizes(folder: epath.Path, config: Mapping[str, Any], sources: Mapping[str, arrays.Lazy]) -> None:
    """Sizes in the configuration must be those of the arrays, as far as these are there."""
    shapes = {name: source.shape for name, source in sources.items()}
    try:
        if foreign.family(config) == 't5':
            sizes = _t5_sizes(shapes)
        else:
            sizes = _vit_sizes(shapes)
            query = shapes['Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel']
            sizes |= {'head_dim': query[2]}
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return  # An array is missing, as `identify.check` says.
    if 'head/kernel' not in shapes:
        sizes.pop('num_labels', None)
    for field in sizes:
        if field in foreign.SIZES and config.get(field, sizes[field]) != sizes[field]:
            raise UserError(
                f'{folder / CONFIG}: {field} is {schema.shown(config[field])}, and the arrays have {sizes[field]}.'
            )


def _read_t5(
    folder: epath.Path, config: Mapping[str, Any], stored: Mapping[str, _Tensor]
) -> tuple[dict[str, arrays.Lazy], dict[str, Any]]:
    try:
        layers = config['num_layers'], config.get('num_decoder_layers') or config['num_layers']
        facts = {'num_heads': config['num_heads'], 'head_dim': config['d_kv']}
    except KeyError as error:
        raise UserError(f'{folder / CONFIG} does not say {error}.') from error
    activations = foreign.t5_activations(folder / CONFIG, config)
    if (len(activations) > 1) != any('.wi_0.' in name for name in stored):
        raise UserError(
            f'{folder / CONFIG}: feed_forward_proj, dense_act_fn and is_gated_act ask for {activations}, and the arrays have '
            f'{"one matrix" if len(activations) > 1 else "two matrices"} (DenseReluDense.wi).'
        )
    for stack in ('encoder', 'decoder'):
        if not any(f'{stack}.block.' in name for name in stored):
            raise UserError(
                f'{folder} holds no {stack}, and our T5 has both an encoder and a decoder: take the whole model.'
            )
    if config['model_type'] != 'umt5' and (
        strange := [
            name for name in stored if re.search(r'\.block\.[1-9]\d*\.layer\.0\..*relative_attention_bias', name)
        ]
    ):
        raise UserError(
            f'{folder} has position biases in every layer ({strange[0]}), as a umT5, and model_type of {CONFIG} is '
            f'{config["model_type"]!r}: set it to umt5 if that is what it is.'
        )
    stored = dict(stored)
    # T5 1.0 scales before a head that is the embedding; mT5 never does. transformers 5 always says that the head is tied, and
    # in a second field whether it scales; a head of its own is then there or not.
    scaled = config.get('scale_decoder_outputs', config.get('tie_word_embeddings', True))
    scaled = bool(scaled) and config['model_type'] != 'mt5'
    # Old files repeat what is shared.
    for copy in ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', *(['lm_head.weight'] if scaled else [])):
        if copy in stored:
            _require_same(folder, 'shared.weight', copy, stored)
            stored.setdefault('shared.weight', stored[copy])
            del stored[copy]
    if not scaled and 'shared.weight' in stored and 'lm_head.weight' not in stored:
        if config.get('tie_word_embeddings') is False:
            warning.once(f'{folder} has no head (lm_head.weight): the embedding is taken, as in transformers 5.')
        stored['lm_head.weight'] = stored['shared.weight']
    facts |= {'mlp_activations': list(activations), 'logits_via_embedding': scaled}
    table = _t5_table(*layers, config['model_type'] == 'umt5')
    return _turned(folder, stored, table, facts['num_heads']), facts


def _require_same(folder: epath.Path, first: str, second: str, stored: Mapping[str, _Tensor]) -> None:
    """Two names of one array must hold the same."""
    if first in stored and (
        stored[first].shape != stored[second].shape
        or stored[first].read(()).tobytes() != stored[second].read(()).tobytes()
    ):
        raise UserError(f'{first} and {second} of {folder} differ, and they stand for one array.')


def _read_vit(
    folder: epath.Path, config: Mapping[str, Any], stored: Mapping[str, _Tensor]
) -> tuple[dict[str, arrays.Lazy], dict[str, Any]]:
    try:
        heads, layers = config['num_attention_heads'], config['num_hidden_layers']
    except KeyError as error:
        raise UserError(f'{folder / CONFIG} does not say {error}.') from error
    gelu = foreign.GELUS[config.get('hidden_act', 'gelu')]
    if any('pooler.' in name for name in stored) and config.get('pooler_act', 'tanh') != 'tanh':
        raise UserError(f'{folder / CONFIG}: pooler_act is {config["pooler_act"]!r}, and our ViT has tanh.')
    prefix = 'vit.' if any(name.startswith('vit.') for name in stored) else ''
    out = _turned(folder, stored, _vit_table(layers, prefix), heads)
    table, cls = out.get('pos_embedding'), out.get('cls')
    if table is not None and cls is not None and len(table.shape) == 3 and cls.shape == (1, 1, table.shape[-1]):
        # The token has a position of its own, which goes into the token: ours has none.
        out['pos_embedding'], out['cls'] = arrays.token_position_into_token(cls, table)
    return out, {'gelu': gelu, 'norm_epsilon': config.get('layer_norm_eps', 1e-12), 'num_heads': heads}


def _turned(folder: epath.Path, stored: Mapping[str, _Tensor], table: Table, heads: int) -> dict[str, arrays.Lazy]:
    unknown = [name for name in stored if name not in table]
    if unknown:
        listing = ', '.join(grouped(unknown, 5))
        rests = {name.partition('.')[2] for name in unknown}
        if len(prefixes := {name.partition('.')[0] for name in unknown}) == 1 and rests <= table.keys():
            raise UserError(
                f"{folder}: the names of {len(unknown)} arrays begin with '{prefixes.pop()}.', as of a model inside another one: "
                f'save the inner model ({listing}).'
            )
        raise UserError(f'{folder} holds arrays that have no counterpart in our models: {listing}.')
    out: dict[str, arrays.Lazy] = {}
    for name, tensor in stored.items():
        ours, kind = table[name]
        turn = functools.partial(_TURNS[kind].to_ours, heads=heads)
        try:
            # Strides of zero: the shape of the result without its numbers.
            shape = turn(np.broadcast_to(np.int8(0), tensor.shape)).shape
        except (ValueError, IndexError) as error:
            raise UserError(f'{name} of {folder} is {list(tensor.shape)}, which does not fit ({error}).') from error
        out[ours] = tensor if kind == 'same' else arrays.Derived(shape, tensor.dtype, (tensor,), turn)
    return out


class HuggingFaceWriter:
    """A dense model as safetensors and `config.json`; see `writing.Writer`. A cut write begins again."""

    def __init__(self, path: epath.Path, leaves: writing.Leaves, shard_bytes: int = _SHARD_BYTES):
        self.path = os.fspath(path)
        self.left_out = {'rng': 'Hugging Face models have no random key'} if 'rng' in leaves else {}
        self._leaves = {name: leaf for name, leaf in leaves.items() if name not in self.left_out}
        self._family, self._config, self._table = _their_names(self._leaves)
        self._step: int | None = None
        self._place(shard_bytes)
        size = sum(header_and_size[1] for header_and_size in self._files.values())
        self._staging = writing.Staging(path, outputs.Kind.NEW_FOLDER, size)
        self._folder = self._staging.path
        self._finished = False
        self._streams: dict[str, Any] = {}

    def todo(self) -> dict[str, list[arrays.Region]]:
        """See `writing.Writer`: every array is turned whole."""
        return {name: [writing.WHOLE] for name in self._leaves}

    def write(self, name: str, region: arrays.Region, value: np.ndarray) -> None:
        """See `writing.Writer`."""
        if name == 'step':
            self._step = int(value)
            return
        theirs, kind = self._table[name]
        turned = np.asarray(_TURNS[kind].to_theirs(value), order='C')
        if name == 'params/pos_embedding':
            # Adding -0 changes no number, not even -0: the token keeps its own.
            turned = np.concatenate([np.full_like(turned[:, :1], -0.0), turned], axis=1)
        file, offset = self._where[theirs]
        with writing.not_refused(self._folder, name):
            if file not in self._streams:
                self._streams[file] = (self._folder / file).open('wb')
            self._streams[file].seek(offset)
            self._streams[file].write(turned.reshape(-1).view(np.uint8).data)

    def finish(self, metadata: Mapping[str, Any], check: writing.Check = lambda reader: None) -> None:
        """See `writing.Writer`."""
        with writing.not_refused(self._folder):
            self._write_rest(metadata)
        check(HuggingFaceReader(self._folder))
        self._staging.publish(last=SINGLE if len(self._files) == 1 else INDEX)
        self._finished = True

    def _write_rest(self, metadata: Mapping[str, Any]) -> None:
        """What is not arrays: headers, index, configuration."""
        notes = {'format': 'pt'} | ({} if self._step is None else {'step': str(self._step)})
        for file, (entries, _) in self._files.items():
            header = json.dumps({'__metadata__': notes, **entries}).encode()
            stream = self._streams[file]
            stream.seek(0)
            # The arrays begin where the longest possible header would end; spaces fill it up, as the format wants.
            stream.write((self._header_bytes - 8).to_bytes(8, 'little') + header.ljust(self._header_bytes - 8))
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        if len(self._files) > 1:
            total = sum(size for _, size in self._files.values())
            index = {'metadata': {'total_size': total}, 'weight_map': {n: file for n, (file, _) in self._where.items()}}
            (self._folder / INDEX).write_text(json.dumps(index, indent=1))
        config = _their_config(self._family, self._config, metadata)
        (self._folder / CONFIG).write_text(json.dumps(config, indent=1))

    def close(self) -> None:
        """See `writing.Writer`."""
        if not self._finished:
            self.discard()

    def discard(self) -> None:
        """See `writing.Writer`."""
        for stream in self._streams.values():
            with contextlib.suppress(OSError):  # a full disk takes no rest either
                stream.close()
        self._staging.discard()
        self._finished = True

    def _place(self, shard_bytes: int) -> None:
        """Gives every array a file and an offset."""
        shards: list[dict[str, tuple[str, tuple[int, ...], int]]] = [{}]
        for name, (theirs, kind) in self._table.items():
            leaf = self._leaves[name]
            shape = _TURNS[kind].to_theirs(np.broadcast_to(np.int8(0), leaf.shape)).shape
            if name == 'params/pos_embedding':
                shape = (1, shape[1] + 1, shape[2])
            code = next(code for code, dtype in _DTYPES.items() if dtype == leaf.dtype)
            size = math.prod(shape) * leaf.dtype.itemsize
            if shards[-1] and sum(entry[2] for entry in shards[-1].values()) + size > shard_bytes:
                shards.append({})
            shards[-1][theirs] = (code, shape, size)
        names = (
            [SINGLE]
            if len(shards) == 1
            else [f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
        )
        self._files: dict[str, tuple[dict[str, Any], int]] = {}
        relative: dict[str, tuple[str, int]] = {}
        for file, shard in zip(names, shards, strict=True):
            offset, entries = 0, {}
            for theirs, (code, shape, size) in shard.items():
                entries[theirs] = {'dtype': code, 'shape': list(shape), 'data_offsets': [offset, offset + size]}
                relative[theirs] = (file, offset)
                offset += size
            self._files[file] = (entries, offset)
        longest = max(len(json.dumps(entries)) for entries, _ in self._files.values()) + 100
        self._header_bytes = 8 + -(-longest // 8) * 8
        self._where = {theirs: (file, self._header_bytes + offset) for theirs, (file, offset) in relative.items()}


def _their_names(leaves: writing.Leaves) -> tuple[str, dict[str, Any], dict[str, tuple[str, str]]]:
    """The family, the sizes in `config.json`, and for each of our leaves (their name, turn).

    Raises:
        UserError: a leaf has no counterpart.
    """
    shapes = {name.removeprefix('params/'): leaf.shape for name, leaf in leaves.items() if name.startswith('params/')}
    family = 't5' if 'token_embedder/embedding' in shapes else 'vit'
    sizes = _t5_sizes(shapes) if family == 't5' else _vit_sizes(shapes)
    if family == 't5':
        table = _t5_table(sizes['num_layers'], sizes['num_decoder_layers'], sizes['model_type'] == 'umt5')
    else:
        table = _vit_table(sizes['num_hidden_layers'], 'vit.' if 'head/kernel' in shapes else '')
    ours = {f'params/{name}': (theirs, kind) for theirs, (name, kind) in table.items()}
    # What no option leaves out comes first.
    for name in sorted(leaves, key=lambda name: name.startswith('opt_state/')):
        if name == 'step':
            continue
        if name not in ours:
            way_out = (
                ': leave the optimizer state out with --optimizer_state=none' if name.startswith('opt_state/') else ''
            )
            if writing.EXPERT in name.split('/'):
                raise UserError(
                    f'{name} has no counterpart in huggingface, which holds no MoE of T5 or ViT: export the MoE as upcycle, '
                    "t5x_legacy or t5x_orbax, or make it dense first with DENSE_OPERATOR = 'average'."
                )
            raise UserError(f'{name} has no counterpart in huggingface, which holds dense T5 and ViT models{way_out}.')
    if family == 'vit':
        for name in ('cls', 'pos_embedding'):
            if name not in shapes:
                raise UserError(
                    f'huggingface has no counterpart of a ViT without params/{name}: its head reads the class token.'
                )
        if 'head/kernel' in shapes and 'pre_logits/kernel' in shapes:
            raise UserError('params/pre_logits/kernel has no counterpart in huggingface below a head.')
    return family, sizes, {name: ours[name] for name in leaves if name != 'step'}


def _t5_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    table = 'relpos_bias/rel_embedding'
    every_layer = f'encoder/layers_0/{table}' in shapes
    heads, buckets = shapes[f'encoder/layers_0/{table}' if every_layer else f'encoder/{table}']
    mlp = next((name for name in shapes if name.endswith('/mlp/wo/kernel')), None)
    vocab_size, width = shapes['token_embedder/embedding']
    layers = {
        stack: len({name.split('/')[1] for name in shapes if name.startswith(f'{stack}/layers_')})
        for stack in ('encoder', 'decoder')
    }
    return {
        'model_type': 'umt5' if every_layer else 't5',
        'vocab_size': vocab_size,
        'd_model': width,
        'd_kv': shapes['encoder/layers_0/attention/query/kernel'][1] // heads,
        'd_ff': 0 if mlp is None else shapes[mlp][0],
        'num_layers': layers['encoder'],
        'num_decoder_layers': layers['decoder'],
        'num_heads': heads,
        'relative_attention_num_buckets': buckets,
        'tie_word_embeddings': 'decoder/logits_dense/kernel' not in shapes,
        'feed_forward_proj': 'gated-gelu' if any(name.endswith('/wi_0/kernel') for name in shapes) else 'relu',
    }


def _vit_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    patch, _, channels, width = shapes['embedding/kernel']
    block = 'Transformer/encoderblock_0'
    mlp = shapes.get(f'{block}/MlpBlock_0/Dense_0/kernel', (0, 0))
    return {
        'hidden_size': width,
        'num_hidden_layers': len(
            {name.split('/')[1] for name in shapes if name.startswith('Transformer/encoderblock_')}
        ),
        'num_attention_heads': shapes[f'{block}/MultiHeadDotProductAttention_0/query/kernel'][1],
        'intermediate_size': mlp[1],
        'patch_size': patch,
        'num_channels': channels,
        'image_size': patch * math.isqrt(shapes.get('pos_embedding', (1, 1))[1]),
        'num_labels': shapes.get('head/kernel', (0, 0))[1],
        **({'pooler_output_size': shapes['pre_logits/kernel'][1]} if 'pre_logits/kernel' in shapes else {}),
        'qkv_bias': True,
    }


def _their_config(family: str, sizes: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    facts = metadata.get('facts') or {}
    if family == 't5':
        activations = tuple(facts.get('mlp_activations') or foreign.ACTIVATIONS[sizes['feed_forward_proj']])
        projection = next((name for name, ours in foreign.ACTIVATIONS.items() if ours == activations), None)
        if projection is None:
            raise UserError(f'mlp_activations = {activations} has no counterpart in huggingface.')
        model_type = sizes['model_type']
        if model_type == 't5' and metadata.get('model_type') == 'mt5':
            model_type = 'mt5'
        return {
            **sizes,
            'architectures': [f'{_T5_CLASSES[model_type]}ForConditionalGeneration'],
            'model_type': model_type,
            'feed_forward_proj': projection,
            'layer_norm_epsilon': 1e-6,
            'relative_attention_max_distance': 128,
            'is_encoder_decoder': True,
            'pad_token_id': 0,
            'eos_token_id': 1,
            'decoder_start_token_id': 0,
        }
    labels = sizes['num_labels']
    # Not `facts.get`: a ViT that does not say is one of ours, and ours is the approximation.
    return {
        'architectures': ['ViTForImageClassification' if labels else 'ViTModel'],
        'model_type': 'vit',
        **{name: value for name, value in sizes.items() if name != 'num_labels'},
        'id2label': {str(i): f'LABEL_{i}' for i in range(labels)},
        'label2id': {f'LABEL_{i}': i for i in range(labels)},
        'hidden_act': 'gelu' if facts.get('gelu') == 'erf' else 'gelu_new',
        'layer_norm_eps': facts.get('norm_epsilon', 1e-6),
    }
