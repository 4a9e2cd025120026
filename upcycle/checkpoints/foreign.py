"""What the configurations of Hugging Face folders say: every field that changes the function is read, compared or refused.

A field is one of five kinds: read, a size that the arrays must have (`SIZES`), one whose only value is ours (`_OURS`), one that
says how inputs are made (`_INPUTS`), or harmless (`_HARMLESS`). Any other one is a warning that names it. Matched, in versions
4.57 and 5.24: configuration_t5.py, configuration_(u)mt5.py, configuration_vit.py, configuration_utils.py and
image_processing_vit.py of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from upcycle import schema, warning
from upcycle.checkpoints import arrays
from upcycle.errors import UserError

# Where a processor is described; the first counts, if it holds `image_processor`.
_PROCESSOR_FILES = ('processor_config.json', 'preprocessor_config.json')

_IN_WORDS = {'t5': 'T5', 'vit': 'ViT'}
_FAMILIES = {'t5': 't5', 'mt5': 't5', 'umt5': 't5', 'vit': 'vit'}  # by `model_type`

# T5's feed-forward layers by `feed_forward_proj`, and its parts by `dense_act_fn`. `gated-gelu` is the tanh approximation in
# transformers (gelu_new), as in T5X.
ACTIVATIONS = {
    'relu': ('relu',),
    'gelu_new': ('gelu',),
    'silu': ('silu',),
    'gated-relu': ('relu', 'linear'),
    'gated-gelu': ('gelu', 'linear'),
    'gated-silu': ('silu', 'linear'),
}
_T5_ACTIVATIONS = {'relu': 'relu', 'silu': 'silu', 'swish': 'silu'}
_T5_ACTIVATIONS |= dict.fromkeys(('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast'), 'gelu')
GELUS = {'gelu': 'erf', 'gelu_python': 'erf', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu_fast': 'tanh'}

# Other names of T5's fields (`attribute_map`).
_ALIASES = {
    'hidden_size': 'd_model',
    'num_attention_heads': 'num_heads',
    'num_hidden_layers': 'num_layers',
    'head_dim': 'd_kv',
}
_Side = schema.Count | Sequence[schema.Count]
# The fields that are read or compared, and what each may be.
_TYPES = {
    't5': {
        **dict.fromkeys(('num_layers', 'num_decoder_layers'), schema.Depth),
        **dict.fromkeys(('num_heads', 'd_kv', 'd_ff', 'd_model', 'vocab_size'), schema.Count),
        **dict.fromkeys(('relative_attention_num_buckets', 'relative_attention_max_distance'), schema.Count),
        'layer_norm_epsilon': schema.Positive,
        **dict.fromkeys(('feed_forward_proj', 'dense_act_fn'), str),
        **dict.fromkeys(('is_gated_act', 'tie_word_embeddings', 'scale_decoder_outputs'), bool),
    },
    'vit': {
        'num_hidden_layers': schema.Depth,
        **dict.fromkeys(('num_attention_heads', 'hidden_size', 'intermediate_size'), schema.Count),
        **dict.fromkeys(('num_channels', 'head_dim', 'pooler_output_size'), schema.Count),
        **dict.fromkeys(('image_size', 'patch_size'), _Side),
        'layer_norm_eps': schema.Positive,
        **dict.fromkeys(('hidden_act', 'pooler_act'), str),
        'num_labels': schema.Whole,
    },
}
# The arrays have these sizes too.
SIZES = {
    *('vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_layers', 'num_decoder_layers', 'num_heads'),
    *('relative_attention_num_buckets', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size'),
    *('patch_size', 'num_channels', 'image_size', 'num_labels', 'head_dim', 'pooler_output_size'),
}
# Of what changes the function otherwise, our models have one value; None: none that a configuration can name.
_NO_VALUE = {'quantization_config': None, 'per_layer_config': None}
_OURS = {
    't5': {
        'relative_attention_max_distance': 128,
        'layer_norm_epsilon': 1e-6,
        'is_encoder_decoder': True,
        'is_decoder': False,
        'tie_encoder_decoder': False,
        'pruned_heads': {},
        **_NO_VALUE,
    },
    'vit': {'qkv_bias': True, 'is_encoder_decoder': False, 'is_decoder': False, 'pruned_heads': {}, **_NO_VALUE},
}
# How the inputs are made, of which the arrays know nothing, and what ours are.
_INPUTS = {'t5': {'pad_token_id': 0, 'decoder_start_token_id': 0, 'eos_token_id': 1}, 'vit': {}}
_ARCHITECTURES = {
    't5': ('ForConditionalGeneration', 'T5WithLMHeadModel'),
    'vit': ('ViTForImageClassification', 'ViTModel'),
}
# What changes no logits of a model that is not in training: where weights come from, how they are stored, run and trained, what
# is returned, how texts are generated, and what classes are called.
_HARMLESS = {
    *(
        '_name_or_path',
        '_commit_hash',
        'name_or_path',
        'transformers_version',
        'model_type',
        'tokenizer_class',
        'processor_class',
    ),
    *(
        'torch_dtype',
        'dtype',
        'use_bfloat16',
        'torchscript',
        'xla_device',
        'transformers_weights',
        '_attn_implementation',
    ),
    *(
        'attn_implementation',
        '_attn_implementation_autoset',
        '_attn_implementation_internal',
        '_experts_implementation_internal',
    ),
    *(
        'experts_implementation',
        'gradient_checkpointing',
        'chunk_size_feed_forward',
        'use_cache',
        'output_past',
        'return_dict',
    ),
    *('use_return_dict', 'output_attentions', 'output_hidden_states', 'output_scores', 'return_dict_in_generate'),
    *(
        'output_logits',
        'tf_legacy_loss',
        'tie_last_hidden_states',
        'add_cross_attention',
        'cross_attention_hidden_size',
    ),
    # Of training, fine-tuning and other heads.
    *(
        'dropout_rate',
        'classifier_dropout',
        'hidden_dropout_prob',
        'attention_probs_dropout_prob',
        'initializer_factor',
    ),
    *('initializer_range', 'finetuning_task', 'problem_type', 'label2id', 'encoder_stride'),
    # T5's length, which relative positions do not have, and its instructions.
    *('n_positions', 'max_position_embeddings', 'task_specific_params', 'prefix'),
    'scalable_attention',  # of Google's umT5: of its T5X model, and of nothing in transformers
    # Of generation.
    *(
        'max_length',
        'max_new_tokens',
        'min_length',
        'min_new_tokens',
        'do_sample',
        'early_stopping',
        'num_beams',
        'max_time',
    ),
    *('num_beam_groups', 'diversity_penalty', 'temperature', 'top_k', 'top_p', 'min_p', 'typical_p', 'epsilon_cutoff'),
    *('eta_cutoff', 'repetition_penalty', 'encoder_repetition_penalty', 'length_penalty', 'no_repeat_ngram_size'),
    *('encoder_no_repeat_ngram_size', 'bad_words_ids', 'force_words_ids', 'renormalize_logits', 'constraints'),
    *('forced_bos_token_id', 'forced_eos_token_id', 'remove_invalid_values', 'exponential_decay_length_penalty'),
    *('suppress_tokens', 'begin_suppress_tokens', 'forced_decoder_ids', 'num_return_sequences', 'penalty_alpha'),
    *('bos_token_id', 'sep_token_id', 'guidance_scale', 'low_memory', 'cache_implementation', 'cache_config'),
}
_HARMLESS_OF = {
    't5': {'id2label', 'num_labels'},
    'vit': {'tie_word_embeddings', 'tie_encoder_decoder', 'pad_token_id', 'eos_token_id', 'decoder_start_token_id'},
}

# What transformers' ViTImageProcessor takes where the file says nothing.
_PROCESSOR = {
    'do_resize': True,
    'size': 224,
    'resample': 2,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': 0.5,
    'image_std': 0.5,
    'do_center_crop': False,
    'crop_size': None,
    'do_flip_channel_order': False,
    'do_pad': False,
}
_PROCESSORS = ('ViTImageProcessor', 'ViTImageProcessorFast', 'ViTFeatureExtractor', 'ViTImageProcessorPil')
_PROCESSORS += ('DeiTImageProcessor', 'DeiTImageProcessorFast', 'DeiTFeatureExtractor', 'DeiTImageProcessorPil')
_HARMLESS_OF_PROCESSORS = {
    *(
        'image_processor_type',
        'feature_extractor_type',
        'processor_class',
        '_valid_processor_keys',
        'return_tensors',
        'device',
    ),
    *('data_format', 'input_data_format', 'default_to_square', 'do_convert_rgb', 'disable_grouping', '_name_or_path'),
    *('transformers_version', 'pad_size', 'image_seq_length', 'auto_map'),
}
_RESAMPLING = {0: 'nearest', 1: 'Lanczos', 2: 'bilinear', 3: 'bicubic', 4: 'box', 5: 'Hamming'}


def family(config: Mapping[str, Any]) -> str:
    """The family of models that a configuration is of."""
    return _FAMILIES[config['model_type']]


def read_config(file: epath.Path) -> dict[str, Any]:
    """What the arrays do not say, nulls left out, after a look at every field; a square side is one number.

    Raises:
        UserError: the file is damaged, is of another model than a T5 or a ViT, or says something that our models do not do.
    """
    config = {name: value for name, value in arrays.read_json(file).items() if value is not None}
    if 'model_type' not in config:
        raise UserError(f'{file} has no model_type, as transformers writes it: only its T5 and ViT are read.')
    if not isinstance(config['model_type'], str) or config['model_type'] not in _FAMILIES:
        raise UserError(f'{file} describes a model of type {config.get("model_type")}: only T5 and ViT are read.')
    which = family(config)
    if which == 't5':
        _resolve_aliases(file, config)
    for name, kind in _TYPES[which].items():
        if name in config and not schema.fits(config[name], kind):
            raise UserError(f'{file}: {name} is {schema.shown(config[name])}, which is not {schema.in_words(kind)}.')
    for name, ours in _OURS[which].items():
        if name in config and config[name] != ours:
            what = 'which is not read' if ours is None else f'and our {_IN_WORDS[which]} has {schema.shown(ours)}'
            raise UserError(f'{file}: {name} is {schema.shown(config[name])}, {what}.')
    if which == 'vit':
        _resolve_vit(file, config)
    _warn(file, config, which)
    return config


def t5_activations(file: epath.Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """T5's activations by our names. `dense_act_fn` and `is_gated_act`, where they are there, override `feed_forward_proj`.

    Raises:
        UserError: it is none of ours.
    """
    projection = config.get('feed_forward_proj', 'relu' if config['model_type'] == 't5' else 'gated-gelu')
    gate, _, name = projection.rpartition('-')
    if gate not in ('', 'gated'):
        raise UserError(f'{file}: feed_forward_proj is {projection!r}, which is not one of {", ".join(ACTIVATIONS)}.')
    name = config.get('dense_act_fn', 'gelu_new' if projection == 'gated-gelu' else name)
    if name not in _T5_ACTIVATIONS:
        field = 'dense_act_fn' if 'dense_act_fn' in config else 'feed_forward_proj'
        raise UserError(
            f'{file}: {field} is {config[field]!r}, and the activations that are read are {", ".join(_T5_ACTIVATIONS)} '
            f'(feed_forward_proj: {", ".join(ACTIVATIONS)}).'
        )
    gated = config.get('is_gated_act', gate == 'gated')
    return (_T5_ACTIVATIONS[name], 'linear') if gated else (_T5_ACTIVATIONS[name],)


def check_images(folder: epath.Path, config: Mapping[str, Any]) -> None:
    """Warns where the configuration of the image processor asks for other images than those that our pipelines make.

    Raises:
        UserError: the file is damaged.
    """
    if family(config) != 'vit':
        return
    for name in _PROCESSOR_FILES:
        file = folder / name
        found = arrays.read_json(file) if file.exists() else {}
        found = found.get('image_processor', found if name == _PROCESSOR_FILES[-1] else {})
        if not isinstance(found, Mapping):
            raise UserError(
                f'{file} is damaged (its image_processor is {schema.shown(found)}): copy the checkpoint again.'
            )
        if found:
            break
    else:
        return
    found = {name: value for name, value in found.items() if value is not None}
    differences = _range_differences(found) + _shape_differences(found, config.get('image_size'))
    kind = found.get('image_processor_type', found.get('feature_extractor_type', _PROCESSORS[0]))
    if kind not in _PROCESSORS:
        differences.append(f'{schema.shown(kind)} is a processor that is not known here')
    if unknown := sorted(found.keys() - _PROCESSOR.keys() - _HARMLESS_OF_PROCESSORS):
        differences.append(f'{", ".join(unknown)} {"is" if len(unknown) == 1 else "are"} not known here')
    if differences:
        warning.once(f'{file} asks for other images than our pipelines make: {"; ".join(differences)}.')


def _resolve_aliases(file: epath.Path, config: dict[str, Any]) -> None:
    for alias, name in _ALIASES.items():
        if alias in config and config.setdefault(name, config[alias]) != config.pop(alias):
            raise UserError(f'{file}: {alias} and {name} are two names of one size, and differ.')


def _resolve_vit(file: epath.Path, config: dict[str, Any]) -> None:
    for name in ('image_size', 'patch_size'):
        sides = config.get(name)
        if isinstance(sides, Sequence):
            if len(sides) not in (1, 2) or sides[0] != sides[-1]:
                raise UserError(f'{file}: {name} is {schema.shown(sides)}, and our ViT takes squares.')
            config[name] = sides[0]
    if not isinstance(config.get('id2label', {}), Mapping):
        raise UserError(f'{file}: id2label is {schema.shown(config["id2label"])}, which is no name for each class.')
    if 'id2label' in config:
        config['num_labels'] = len(config['id2label'])
    if config.get('hidden_act', 'gelu') not in GELUS:
        raise UserError(f'{file}: hidden_act is {config["hidden_act"]!r}, which is not one of {", ".join(GELUS)}.')


def _warn(file: epath.Path, config: Mapping[str, Any], which: str) -> None:
    known = _TYPES[which].keys() | _OURS[which].keys() | _INPUTS[which].keys() | _HARMLESS | _HARMLESS_OF[which]
    known |= {'architectures', *(['id2label'] if which == 'vit' else [])}
    if unknown := [name for name in config if name not in known]:
        names = [name if name.isidentifier() else schema.shown(name) for name in unknown]
        shown = ', '.join(f'{name} = {schema.shown(config[field])}' for name, field in zip(names, unknown, strict=True))
        warning.once(f'{file} has fields that are not known here and may change what the model computes: {shown}.')
    for name, ours in _INPUTS[which].items():
        if config.get(name, ours) not in (ours, [ours]):
            warning.once(f'{file}: {name} is {schema.shown(config[name])}, and our pipelines take {ours}.')
    if config['model_type'] == 'mt5' and config.get('tie_word_embeddings') and _is_of_transformers_4(config):
        warning.once(
            f'{file}: tie_word_embeddings is True, for which transformers 4 scales the logits of mT5 and 5 does not: they are '
            'not scaled.'
        )
    named = config.get('architectures', [])
    names = named if isinstance(named, list) and all(isinstance(name, str) for name in named) else [str(named)]
    if strange := [name for name in names if not name.endswith(_ARCHITECTURES[which])]:
        warning.once(f'{file}: architectures is {schema.shown(strange)}, which is read as {_ARCHITECTURES[which][0]}.')


def _is_of_transformers_4(config: Mapping[str, Any]) -> bool:
    return str(config.get('transformers_version', '')).startswith('4.')


def _range_differences(found: Mapping[str, Any]) -> list[str]:
    """Where black and white become something else than -1 and 1 in every channel."""
    said = {**_PROCESSOR, **found}
    try:
        factor = float(said['rescale_factor']) if said['do_rescale'] else 1.0
        mean, std = (
            [float(x) for x in said[name]] if isinstance(said[name], list) else [float(said[name])]
            for name in ('image_mean', 'image_std')
        )
        if not said['do_normalize']:
            mean, std = [0.0], [1.0]
        channels = max(len(mean), len(std))
        mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
        ranges = [((0 - m) / s, (255 * factor - m) / s) for m, s in zip(mean, std, strict=True)]
    except (TypeError, ValueError, ZeroDivisionError):
        return ['image_mean, image_std or rescale_factor are no numbers, or not one for each channel']
    fields = ', '.join(
        f'{name} = {schema.shown(said[name])}'
        for name in ('do_rescale', 'rescale_factor', 'do_normalize', 'image_mean', 'image_std')
        if name in found
    )
    if all(abs(low + 1) + abs(high - 1) < 1e-3 for low, high in ranges):
        return []
    low, high = ranges[0]
    if all(abs(a - low) + abs(b - high) < 1e-3 for a, b in ranges):
        return [
            f'black and white become {low:.4g} and {high:.4g} ({fields}), which VALUE_RANGE = ({low:.6g}, {high:.6g}) does'
        ]
    return [f'each channel has a range of its own ({fields}), and VALUE_RANGE is one for all']


def _shape_differences(found: Mapping[str, Any], image_size: Any) -> list[str]:
    said = {**_PROCESSOR, **found}
    switches = [name for name in found if name in _PROCESSOR and name.startswith('do_')]
    differences = [
        f'{name} = {schema.shown(found[name])} is neither True nor False'
        for name in switches
        if not isinstance(found[name], bool)
    ]
    if not said['do_resize'] and not said['do_center_crop']:
        differences.append('do_resize = False, and ours resize every image')
    name = 'crop_size' if said['do_center_crop'] and said['crop_size'] is not None else 'size'
    size = said[name] if name in found else image_size
    sides = [size.get(side) for side in ('height', 'width')] if isinstance(size, Mapping) else size
    sides = sides if isinstance(sides, list) else [sides]
    if (
        (not sides or sides != [image_size] * len(sides))
        and None not in (size, image_size)
        and not _within_crop(said, name)
    ):
        differences.append(
            f'{name} = {schema.shown(size)}, and image_size of config.json is {schema.shown(image_size)}'
        )
    if 'resample' in found and found['resample'] != _PROCESSOR['resample']:
        resample = found['resample']
        how = _RESAMPLING.get(resample, 'not known') if isinstance(resample, int) else 'not known'
        differences.append(f'resample = {schema.shown(resample)} ({how}), and ours is bilinear')
    differences += [f'{name} = True' for name in ('do_flip_channel_order', 'do_pad') if said[name]]
    return differences


def _within_crop(said: Mapping[str, Any], name: str) -> bool:
    """Whether a size is what a crop is taken from, whose own size nothing says."""
    return bool(said['do_center_crop']) and name == 'size'
