"""ViT of Hugging Face: classifiers and bare models. Matched: configuration_vit.py, modeling_vit.py, conversion_mapping.py."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from upcycle import schema
from upcycle.checkpoints import class_token, views
from upcycle.checkpoints.hf import image_processor
from upcycle.checkpoints.hf.architecture import LINEAR, Architecture, Config, Entry, Shapes, Table, Tensors, Turn
from upcycle.checkpoints.hf.sources import CONFIG, by_table, required
from upcycle.errors import UserError

_GELUS = {'gelu': 'erf', 'gelu_python': 'erf', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu_fast': 'tanh'}
_Side = schema.Count | Sequence[schema.Count]
# From names in transformers 5 to those in 4, as in conversion_mapping.py.
_RENAMED_IN_5 = (
    (r'^(vit\.)?layers\.(\d+)\.', r'\1encoder.layer.\2.'),
    (r'\.attention\.(?:attention\.)?q_proj\.', '.attention.attention.query.'),
    (r'\.attention\.(?:attention\.)?k_proj\.', '.attention.attention.key.'),
    (r'\.attention\.(?:attention\.)?v_proj\.', '.attention.attention.value.'),
    (r'\.attention\.o_proj\.', '.attention.output.dense.'),
    (r'\.mlp\.fc1\.', '.intermediate.dense.'),
    (r'\.mlp\.fc2\.', '.output.dense.'),
)
_POOLER = 'part of a layer that classifiers of transformers do not use'
_MASK_TOKEN = 'the token of masked patches, unused in classification'
_BLOCK = 'Transformer/encoderblock_0'

# (D, channels, P, P) <-> (P, P, channels, D)
_PATCHES = Turn(lambda x: views.Transposed(x, (2, 3, 1, 0)), lambda x: x.transpose(3, 2, 0, 1))


def _to_heads(heads: int) -> Turn:
    """(H N, D) <-> (D, H, N)."""
    return Turn(lambda x: views.SplitAxis(views.reversed_axes(x), 1, heads), lambda x: x.reshape(x.shape[0], -1).T)


def _heads_bias(heads: int) -> Turn:
    """(H N) <-> (H, N)."""
    return Turn(lambda x: views.SplitAxis(x, 0, heads), lambda x: x.reshape(-1))


def _from_heads(heads: int) -> Turn:
    """(D, H N) <-> (H, N, D)."""
    return Turn(lambda x: views.SplitAxis(views.reversed_axes(x), 0, heads), lambda x: x.reshape(-1, x.shape[-1]).T)


def _with_position_of_token(x: np.ndarray) -> np.ndarray:
    # Adding -0.0 keeps the class token bit for bit.
    return np.concatenate([np.full_like(x[:, :1], -0.0), x], axis=1)


# Their table has a row for the class token; see `ViT.read`.
_POSITIONS = Turn(lambda x: x, _with_position_of_token)


class ViT(Architecture):
    """See `Architecture`."""

    title = 'ViT'
    family = 'vit'
    model_types = ('vit',)
    classes = ('ViTForImageClassification', 'ViTModel')
    fields = {
        'num_hidden_layers': schema.Depth,
        **dict.fromkeys(('num_attention_heads', 'hidden_size', 'intermediate_size'), schema.Count),
        **dict.fromkeys(('num_channels', 'head_dim', 'pooler_output_size'), schema.Count),
        **dict.fromkeys(('image_size', 'patch_size'), _Side),
        'layer_norm_eps': schema.Positive,
        **dict.fromkeys(('hidden_act', 'pooler_act'), str),
        'num_labels': schema.Whole,
    }
    sizes = frozenset(
        ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size', 'patch_size', 'num_channels')
        + ('image_size', 'num_labels', 'head_dim', 'pooler_output_size')
    )
    values = {'qkv_bias': True, 'is_encoder_decoder': False, 'is_decoder': False, 'pruned_heads': {}}
    harmless = frozenset(
        ('tie_word_embeddings', 'tie_encoder_decoder', 'pad_token_id', 'eos_token_id', 'decoder_start_token_id')
        + ('id2label',)  # read by `resolve`
    )
    depths = {'num_hidden_layers': r'(?:vit\.)?encoder\.layer\.(\d+)\.'}
    not_read = {'vit.embeddings.mask_token': _MASK_TOKEN, 'embeddings.mask_token': _MASK_TOKEN}

    def resolve(self, file: epath.Path, config: dict[str, Any]) -> None:
        """Replaces square sizes by their side, and `id2label` by the number of labels; see `Architecture`."""
        for name in ('image_size', 'patch_size'):
            sides = config.get(name)
            if isinstance(sides, Sequence):
                if len(sides) not in (1, 2) or sides[0] != sides[-1]:
                    raise UserError(f'{file}: {name} is {schema.shown(sides)}: our ViT supports squares only.')
                config[name] = sides[0]
        if not isinstance(config.get('id2label', {}), Mapping):
            raise UserError(f'{file}: id2label is {schema.shown(config["id2label"])}: it must name each class.')
        if 'id2label' in config:
            config['num_labels'] = len(config['id2label'])
        if config.get('hidden_act', 'gelu') not in _GELUS:
            raise UserError(f'{file}: hidden_act is {config["hidden_act"]!r}: it must be one of {", ".join(_GELUS)}.')

    def check_inputs(self, folder: epath.Path, config: Config) -> None:
        """See `Architecture`."""
        image_processor.check(folder, config.get('image_size'))

    def rename(self, name: str) -> str:
        """See `Architecture`."""
        for pattern, replacement in _RENAMED_IN_5:
            name = re.sub(pattern, replacement, name)
        return name

    def left_out(self, stored: Tensors) -> dict[str, str]:
        """See `Architecture`."""
        left_out = super().left_out(stored)
        if 'classifier.weight' in stored:
            left_out |= {name: _POOLER for name in stored if name.startswith('vit.pooler.')}
        return left_out

    def read(self, folder: epath.Path, config: Config, stored: Tensors) -> tuple[dict[str, views.Lazy], dict[str, Any]]:
        """See `Architecture`."""
        heads, layers = required(folder, config, 'num_attention_heads', 'num_hidden_layers')
        gelu = _GELUS[config.get('hidden_act', 'gelu')]
        if any('pooler.' in name for name in stored) and config.get('pooler_act', 'tanh') != 'tanh':
            raise UserError(f'{folder / CONFIG}: pooler_act is {config["pooler_act"]!r}: our ViT supports tanh only.')
        prefix = 'vit.' if any(name.startswith('vit.') for name in stored) else ''
        sources = by_table(folder, stored, _table(layers, heads, prefix))
        table, cls = sources.get('pos_embedding'), sources.get('cls')
        if table is not None and cls is not None and len(table.shape) == 3 and cls.shape == (1, 1, table.shape[-1]):
            # They add a position to the class token; we store the sum as the token.
            sources['pos_embedding'], sources['cls'] = class_token.without_own_position(cls, table)
        epsilon = config.get('layer_norm_eps', 1e-12)
        return sources, {'facts': {'gelu': gelu, 'norm_epsilon': epsilon, 'num_heads': heads}}

    def holds(self, shapes: Shapes) -> bool:
        """See `Architecture`."""
        return 'embedding/kernel' in shapes

    def config_sizes(self, shapes: Shapes) -> dict[str, Any]:
        """See `Architecture`."""
        patch, _, channels, width = shapes['embedding/kernel']
        mlp = shapes.get(f'{_BLOCK}/MlpBlock_0/Dense_0/kernel', (0, 0))
        blocks = {name.split('/')[1] for name in shapes if name.startswith('Transformer/encoderblock_')}
        return {
            'hidden_size': width,
            'num_hidden_layers': len(blocks),
            'num_attention_heads': shapes[f'{_BLOCK}/MultiHeadDotProductAttention_0/query/kernel'][1],
            'intermediate_size': mlp[1],
            'patch_size': patch,
            'num_channels': channels,
            'image_size': patch * math.isqrt(shapes.get('pos_embedding', (1, 1))[1]),
            'num_labels': shapes.get('head/kernel', (0, 0))[1],
            **({'pooler_output_size': shapes['pre_logits/kernel'][1]} if 'pre_logits/kernel' in shapes else {}),
            'qkv_bias': True,
        }

    def compared_sizes(self, shapes: Shapes) -> dict[str, Any]:
        """See `Architecture`."""
        sizes = self.config_sizes(shapes)
        sizes['head_dim'] = shapes[f'{_BLOCK}/MultiHeadDotProductAttention_0/query/kernel'][2]
        if 'head/kernel' not in shapes:
            del sizes['num_labels']
        return sizes

    def table(self, sizes: Config, shapes: Shapes) -> Table:
        """See `Architecture`."""
        prefix = 'vit.' if 'head/kernel' in shapes else ''
        return _table(sizes['num_hidden_layers'], sizes['num_attention_heads'], prefix)

    def validate(self, shapes: Shapes) -> None:
        """See `Architecture`."""
        for name in ('cls', 'pos_embedding'):
            if name not in shapes:
                raise UserError(
                    f'a ViT without params/{name} cannot be stored as huggingface, whose head reads the class token.'
                )
        if 'head/kernel' in shapes and 'pre_logits/kernel' in shapes:
            raise UserError('params/pre_logits/kernel cannot be stored as huggingface in a model with a head.')

    def config(self, sizes: Config, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """See `Architecture`."""
        facts = metadata.get('facts') or {}
        labels = sizes['num_labels']
        # Checkpoints without this fact are ours, with the tanh approximation.
        return {
            'architectures': ['ViTForImageClassification' if labels else 'ViTModel'],
            'model_type': 'vit',
            **{name: value for name, value in sizes.items() if name != 'num_labels'},
            'id2label': {str(i): f'LABEL_{i}' for i in range(labels)},
            'label2id': {f'LABEL_{i}': i for i in range(labels)},
            'hidden_act': 'gelu' if facts.get('gelu') == 'erf' else 'gelu_new',
            'layer_norm_eps': facts.get('norm_epsilon', 1e-6),
        }


def _table(layers: int, heads: int, prefix: str) -> Table:
    """`prefix` is 'vit.' in a model with a classification head, and empty otherwise."""
    table = {
        'embedding/kernel': Entry(f'{prefix}embeddings.patch_embeddings.projection.weight', _PATCHES),
        'embedding/bias': Entry(f'{prefix}embeddings.patch_embeddings.projection.bias'),
        'pos_embedding': Entry(f'{prefix}embeddings.position_embeddings', _POSITIONS),
        'cls': Entry(f'{prefix}embeddings.cls_token'),
        'Transformer/encoder_norm/scale': Entry(f'{prefix}layernorm.weight'),
        'Transformer/encoder_norm/bias': Entry(f'{prefix}layernorm.bias'),
        'pre_logits/kernel': Entry(f'{prefix}pooler.dense.weight', LINEAR),
        'pre_logits/bias': Entry(f'{prefix}pooler.dense.bias'),
        'head/kernel': Entry('classifier.weight', LINEAR),
        'head/bias': Entry('classifier.bias'),
    }
    for i in range(layers):
        table |= _block(f'{prefix}encoder.layer.{i}', f'Transformer/encoderblock_{i}', heads)
    return table


def _block(theirs: str, ours: str, heads: int) -> Table:
    table = {}
    attention = f'{ours}/MultiHeadDotProductAttention_0'
    for part in ('query', 'key', 'value'):
        table[f'{attention}/{part}/kernel'] = Entry(f'{theirs}.attention.attention.{part}.weight', _to_heads(heads))
        table[f'{attention}/{part}/bias'] = Entry(f'{theirs}.attention.attention.{part}.bias', _heads_bias(heads))
    table[f'{attention}/out/kernel'] = Entry(f'{theirs}.attention.output.dense.weight', _from_heads(heads))
    table[f'{attention}/out/bias'] = Entry(f'{theirs}.attention.output.dense.bias')
    for their_name, our_name in (('intermediate.dense', 'Dense_0'), ('output.dense', 'Dense_1')):
        table[f'{ours}/MlpBlock_0/{our_name}/kernel'] = Entry(f'{theirs}.{their_name}.weight', LINEAR)
        table[f'{ours}/MlpBlock_0/{our_name}/bias'] = Entry(f'{theirs}.{their_name}.bias')
    for their_name, our_name in (('layernorm_before', 'LayerNorm_0'), ('layernorm_after', 'LayerNorm_1')):
        table[f'{ours}/{our_name}/scale'] = Entry(f'{theirs}.{their_name}.weight')
        table[f'{ours}/{our_name}/bias'] = Entry(f'{theirs}.{their_name}.bias')
    return table
