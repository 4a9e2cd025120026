"""T5 of Hugging Face: 1.0, 1.1, Flan, mT5 and umT5. Matched: configuration_t5.py, configuration_(u)mt5.py, modeling_(u)mt5.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle import schema, warning
from upcycle.checkpoints import views
from upcycle.checkpoints.hf.architecture import LINEAR, Architecture, Config, Entry, Shapes, Table, Tensors
from upcycle.checkpoints.hf.sources import CONFIG, are_equal, by_table, required
from upcycle.errors import UserError

# Activations by `feed_forward_proj`. `gated-gelu` is the tanh approximation in transformers (gelu_new), as in T5X.
ACTIVATIONS = {
    'relu': ('relu',),
    'gelu_new': ('gelu',),
    'silu': ('silu',),
    'gated-relu': ('relu', 'linear'),
    'gated-gelu': ('gelu', 'linear'),
    'gated-silu': ('silu', 'linear'),
}
# Activations by `dense_act_fn`.
_ACT_FNS = {'relu': 'relu', 'silu': 'silu', 'swish': 'silu'}
_ACT_FNS |= dict.fromkeys(('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast'), 'gelu')

_CLASSES = {'t5': 'T5', 'mt5': 'MT5', 'umt5': 'UMT5'}
# Kinds of sentinels other than T5's, by `model_type` and `vocab_size`.
_OWN_VOCABULARIES = {('mt5', 250112): 'mt5', ('umt5', 256384): 'umt5'}
_POSITION_BIASES_ELSEWHERE = re.compile(r'\.block\.[1-9]\d*\.layer\.0\..*relative_attention_bias')
# The attention layers of a block: (their name, our name, our name of the norm).
_ATTENTIONS = {
    'encoder': (('SelfAttention', 'attention', 'pre_attention_layer_norm'),),
    'decoder': (
        ('SelfAttention', 'self_attention', 'pre_self_attention_layer_norm'),
        ('EncDecAttention', 'encoder_decoder_attention', 'pre_cross_attention_layer_norm'),
    ),
}
_PROJECTIONS = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out'}


class T5(Architecture):
    """See `Architecture`."""

    title = 'T5'
    family = 't5'
    model_types = ('t5', 'mt5', 'umt5')
    classes = ('ForConditionalGeneration', 'T5WithLMHeadModel')
    fields = {
        **dict.fromkeys(('num_layers', 'num_decoder_layers'), schema.Depth),
        **dict.fromkeys(('num_heads', 'd_kv', 'd_ff', 'd_model', 'vocab_size'), schema.Count),
        **dict.fromkeys(('relative_attention_num_buckets', 'relative_attention_max_distance'), schema.Count),
        'layer_norm_epsilon': schema.Positive,
        **dict.fromkeys(('feed_forward_proj', 'dense_act_fn'), str),
        **dict.fromkeys(('is_gated_act', 'tie_word_embeddings', 'scale_decoder_outputs'), bool),
    }
    sizes = frozenset(
        ('vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_layers', 'num_decoder_layers', 'num_heads')
        + ('relative_attention_num_buckets',)
    )
    values = {
        'relative_attention_max_distance': 128,
        'layer_norm_epsilon': 1e-6,
        'is_encoder_decoder': True,
        'is_decoder': False,
        'tie_encoder_decoder': False,
        'pruned_heads': {},
    }
    inputs = {'pad_token_id': 0, 'decoder_start_token_id': 0, 'eos_token_id': 1}
    harmless = frozenset(
        ('id2label', 'num_labels')
        + ('max_position_embeddings',)  # relative positions have no maximum
        + ('scalable_attention',)  # of the T5X model of Google's umT5; unused in transformers
    )
    aliases = {
        'hidden_size': 'd_model',
        'num_attention_heads': 'num_heads',
        'num_hidden_layers': 'num_layers',
        'head_dim': 'd_kv',
    }
    depths = {'num_layers': r'encoder\.block\.(\d+)\.', 'num_decoder_layers': r'decoder\.block\.(\d+)\.'}
    not_read = {
        'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight': 'an unused table of early T5 1.0 files'
    }

    def warn(self, file: epath.Path, config: Config) -> None:
        """See `Architecture`."""
        of_transformers_4 = str(config.get('transformers_version', '')).startswith('4.')
        if config['model_type'] == 'mt5' and config.get('tie_word_embeddings') and of_transformers_4:
            warning.once(
                f'{file}: tie_word_embeddings is True: the logits of this mT5 are not scaled, as in transformers 5; '
                'transformers 4 scales them.'
            )

    def read(self, folder: epath.Path, config: Config, stored: Tensors) -> tuple[dict[str, views.Lazy], dict[str, Any]]:
        """See `Architecture`."""
        layers, heads, head_dim = required(folder, config, 'num_layers', 'num_heads', 'd_kv')
        activations = _activations(folder / CONFIG, config)
        is_umt5 = config['model_type'] == 'umt5'
        _validate_tensors(folder, config, activations, stored)
        # T5 1.0 scales the decoder's output before a tied head; mT5 never does. transformers 5 always writes that the head is
        # tied, a second field says whether to scale, and a separate head may exist.
        scaled = config.get('scale_decoder_outputs', config.get('tie_word_embeddings', True))
        scaled = bool(scaled) and config['model_type'] != 'mt5'
        stored = _with_shared(folder, config, dict(stored), scaled)
        table = _table(layers, config.get('num_decoder_layers') or layers, biases_in_every_layer=is_umt5)
        facts = {'num_heads': heads, 'head_dim': head_dim}
        facts |= {'mlp_activations': list(activations), 'logits_via_embedding': scaled}
        # ByT5's configuration differs from T5's only in the tokenizer.
        is_byt5 = config.get('tokenizer_class') == 'ByT5Tokenizer'
        kind = 'byt5' if is_byt5 else _OWN_VOCABULARIES.get((config['model_type'], config.get('vocab_size')))
        return by_table(folder, stored, table), {'facts': facts, **({'sentinels': kind} if kind else {})}

    def holds(self, shapes: Shapes) -> bool:
        """See `Architecture`."""
        return 'token_embedder/embedding' in shapes and any(name.startswith('encoder/') for name in shapes)

    def config_sizes(self, shapes: Shapes) -> dict[str, Any]:
        """See `Architecture`."""
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

    def table(self, sizes: Config, shapes: Shapes) -> Table:
        """See `Architecture`."""
        is_umt5 = sizes['model_type'] == 'umt5'
        return _table(sizes['num_layers'], sizes['num_decoder_layers'], biases_in_every_layer=is_umt5)

    def config(self, sizes: Config, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """See `Architecture`."""
        facts = metadata.get('facts') or {}
        activations = tuple(facts.get('mlp_activations') or ACTIVATIONS[sizes['feed_forward_proj']])
        projection = next((name for name, ours in ACTIVATIONS.items() if ours == activations), None)
        if projection is None:
            raise UserError(f'mlp_activations = {activations} cannot be stored as huggingface.')
        model_type = sizes['model_type']
        if model_type == 't5' and metadata.get('model_type') == 'mt5':
            model_type = 'mt5'
        return {
            **sizes,
            'architectures': [f'{_CLASSES[model_type]}ForConditionalGeneration'],
            'model_type': model_type,
            'feed_forward_proj': projection,
            'layer_norm_epsilon': 1e-6,
            'relative_attention_max_distance': 128,
            'is_encoder_decoder': True,
            'pad_token_id': 0,
            'eos_token_id': 1,
            'decoder_start_token_id': 0,
        }


def _table(encoder_layers: int, decoder_layers: int, *, biases_in_every_layer: bool) -> Table:
    """`biases_in_every_layer`: position biases are in every layer, as in umT5, instead of the first layer of each stack."""
    table = {
        'token_embedder/embedding': Entry('shared.weight'),
        'decoder/logits_dense/kernel': Entry('lm_head.weight', LINEAR),
    }
    for stack, count in (('encoder', encoder_layers), ('decoder', decoder_layers)):
        for i in range(count if biases_in_every_layer else 1):
            theirs = f'{stack}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight'
            ours = f'{stack}/layers_{i}' if biases_in_every_layer else stack
            table[f'{ours}/relpos_bias/rel_embedding'] = Entry(theirs, LINEAR)
        table[f'{stack}/{stack}_norm/scale'] = Entry(f'{stack}.final_layer_norm.weight')
        for i in range(count):
            table |= _block(stack, f'{stack}.block.{i}.layer', f'{stack}/layers_{i}')
    return table


def _block(stack: str, theirs: str, ours: str) -> Table:
    table = {}
    for j, (their_name, our_name, norm) in enumerate(_ATTENTIONS[stack]):
        for letter, part in _PROJECTIONS.items():
            table[f'{ours}/{our_name}/{part}/kernel'] = Entry(f'{theirs}.{j}.{their_name}.{letter}.weight', LINEAR)
        table[f'{ours}/{norm}/scale'] = Entry(f'{theirs}.{j}.layer_norm.weight')
    j = len(_ATTENTIONS[stack])
    for matrix in ('wi', 'wi_0', 'wi_1', 'wo'):
        table[f'{ours}/mlp/{matrix}/kernel'] = Entry(f'{theirs}.{j}.DenseReluDense.{matrix}.weight', LINEAR)
    table[f'{ours}/pre_mlp_layer_norm/scale'] = Entry(f'{theirs}.{j}.layer_norm.weight')
    return table


def _activations(file: epath.Path, config: Config) -> tuple[str, ...]:
    """Returns our names of the activations. `dense_act_fn` and `is_gated_act`, if present, override `feed_forward_proj`.

    Raises:
      UserError: the activation is not supported.
    """
    projection = config.get('feed_forward_proj', 'relu' if config['model_type'] == 't5' else 'gated-gelu')
    gate, _, name = projection.rpartition('-')
    if gate not in ('', 'gated'):
        raise UserError(f'{file}: feed_forward_proj is {projection!r}: it must be one of {", ".join(ACTIVATIONS)}.')
    name = config.get('dense_act_fn', 'gelu_new' if projection == 'gated-gelu' else name)
    if name not in _ACT_FNS:
        field = 'dense_act_fn' if 'dense_act_fn' in config else 'feed_forward_proj'
        raise UserError(
            f'{file}: {field} is {config[field]!r}: it must be one of {", ".join(_ACT_FNS)} (feed_forward_proj: '
            f'{", ".join(ACTIVATIONS)}).'
        )
    gated = config.get('is_gated_act', gate == 'gated')
    return (_ACT_FNS[name], 'linear') if gated else (_ACT_FNS[name],)


def _validate_tensors(folder: epath.Path, config: Config, activations: tuple[str, ...], stored: Tensors) -> None:
    """Raises UserError if the tensors contradict the configuration, or a stack is missing."""
    is_gated = len(activations) > 1
    if is_gated != any('.wi_0.' in name for name in stored):
        raise UserError(
            f'{folder / CONFIG}: feed_forward_proj, dense_act_fn and is_gated_act ask for {activations}, but the arrays have '
            f'{"one matrix" if is_gated else "two matrices"} (DenseReluDense.wi).'
        )
    for stack in ('encoder', 'decoder'):
        if not any(f'{stack}.block.' in name for name in stored):
            raise UserError(f'{folder} holds no {stack}: our T5 needs encoder and decoder, so use the whole model.')
    elsewhere = [name for name in stored if _POSITION_BIASES_ELSEWHERE.search(name)]
    if config['model_type'] != 'umt5' and elsewhere:
        raise UserError(
            f'{folder} has position biases in every layer ({elsewhere[0]}), as umT5, but model_type of {CONFIG} is '
            f'{config["model_type"]!r}: set it to umt5 if the model is one.'
        )


def _with_shared(folder: epath.Path, config: Config, stored: dict[str, Any], scaled: bool) -> Tensors:
    """Returns the tensors with one embedding, and with a head unless the model scales before a tied head.

    Raises:
      UserError: copies of the embedding differ.
    """
    # Old files contain copies of the shared embedding.
    for copy in ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', *(['lm_head.weight'] if scaled else [])):
        if copy in stored:
            tensor = stored.pop(copy)
            shared = stored.setdefault('shared.weight', tensor)
            if shared is not tensor and not are_equal(shared, tensor):
                raise UserError(f'shared.weight and {copy} of {folder} differ, but are names of one array.')
    if not scaled and 'shared.weight' in stored and 'lm_head.weight' not in stored:
        if config.get('tie_word_embeddings') is False:
            warning.once(f'{folder} has no head (lm_head.weight): the embedding is used, as in transformers 5.')
        stored['lm_head.weight'] = stored['shared.weight']
    return stored
