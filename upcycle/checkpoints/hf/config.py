"""Reads `config.json` of a Hugging Face folder: every field that changes the function is read, compared or refused.

A field is read, compared with a shape, restricted to our value, a description of the inputs, or harmless; see
`architecture.Architecture`. Unknown fields cause a warning, or an error if the architecture says so. Matched:
configuration_utils.py of transformers 4.57 and 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle import schema, warning
from upcycle.checkpoints import hf, json_files
from upcycle.checkpoints.hf.architecture import Architecture
from upcycle.errors import UserError

# Fields of any architecture that our models do not support, and those of quantised models.
_NO_VALUE = {'per_layer_config': None}
_QUANTISED = ('quantization_config', 'quantization', 'compression_config')
# Fields that do not change the logits at evaluation: origin, storage and execution of weights, and outputs; training, fine-tuning
# and other heads; generation and tasks.
_HARMLESS = """
    _name_or_path _commit_hash name_or_path transformers_version model_type tokenizer_class processor_class
    torch_dtype dtype use_bfloat16 torchscript xla_device transformers_weights _attn_implementation
    attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation_internal experts_implementation gradient_checkpointing chunk_size_feed_forward
    use_cache output_past return_dict use_return_dict output_attentions output_hidden_states output_scores
    return_dict_in_generate output_logits tf_legacy_loss tie_last_hidden_states add_cross_attention
    cross_attention_hidden_size

    dropout_rate classifier_dropout hidden_dropout_prob attention_probs_dropout_prob initializer_factor
    initializer_range finetuning_task problem_type label2id encoder_stride

    prefix task_specific_params n_positions max_length max_new_tokens min_length min_new_tokens do_sample
    early_stopping num_beams max_time num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p
    epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids force_words_ids renormalize_logits constraints
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens forced_decoder_ids num_return_sequences penalty_alpha bos_token_id
    sep_token_id guidance_scale low_memory cache_implementation cache_config
"""


def read_config(file: epath.Path) -> tuple[dict[str, Any], Architecture]:
    """Returns the checked fields without nulls, and the architecture.

    Raises:
      UserError: the file is damaged, or the architecture or the value of a field is not supported.
    """
    return checked_config(file, json_files.read_json(file))


def checked_config(file: epath.Path, content: dict[str, Any]) -> tuple[dict[str, Any], Architecture]:
    """Returns the checked fields of a configuration; see `read_config`. `file`: for messages."""
    if content.get('model_type') is None:
        raise UserError(
            f'{file} has no model_type, which transformers writes: only its {hf.TITLES} models can be read.'
        )
    model_type = content['model_type']
    if not isinstance(model_type, str) or model_type not in hf.BY_MODEL_TYPE:
        raise UserError(f'{file} has the model_type {model_type}: only {hf.TITLES} models can be read.')
    architecture = hf.BY_MODEL_TYPE[model_type]
    config = {name: value for name, value in content.items() if value is not None}
    if quantised := [name for name in _QUANTISED if name in config]:
        raise UserError(f'{file} has {quantised[0]}, so the model is quantised: use the original model.')
    _resolve_aliases(file, config, architecture.aliases)
    given = {architecture.aliases.get(name, name) for name in content}
    config |= {name: value for name, value in architecture.defaults.items() if name not in given}
    if nulls := [name for name in architecture.defaults if name not in config and name not in architecture.nullable]:
        default = schema.shown(architecture.defaults[nulls[0]])
        raise UserError(f'{file}: {nulls[0]} is null: set it, or remove it if it is {default}, the default.')
    for name, kind in architecture.fields.items():
        if name in config and not schema.fits(config[name], kind):
            raise UserError(f'{file}: {name} is {schema.shown(config[name])}: it must be {schema.in_words(kind)}.')
    for name, ours in (architecture.values | _NO_VALUE).items():
        if name in config and config[name] != ours:
            supported = (
                'not supported' if ours is None else f'our {architecture.title} supports {schema.shown(ours)} only'
            )
            raise UserError(f'{file}: {name} is {schema.shown(config[name])}: {supported}.')
    architecture.resolve(file, config)
    _refuse_or_warn(file, config, architecture)
    return config, architecture


def summary(file: epath.Path) -> str:
    """Describes a `config.json` of ours in a few words, such as 'Mixtral, 8 experts, top 2, bfloat16'."""
    config = json_files.read_json(file)
    words = [hf.BY_MODEL_TYPE[config['model_type']].title]
    words += [f'{config[name]} experts' for name in ('num_experts', 'num_local_experts') if name in config]
    words += [f'top {config["num_experts_per_tok"]}'] if 'num_experts_per_tok' in config else []
    return ', '.join([*words, config['torch_dtype']])


def _resolve_aliases(file: epath.Path, config: dict[str, Any], aliases: Mapping[str, str]) -> None:
    for alias, name in aliases.items():
        if alias in config and config.setdefault(name, config[alias]) != config.pop(alias):
            raise UserError(f'{file}: {alias} and {name} are names of the same field and must be equal.')


def _refuse_or_warn(file: epath.Path, config: Mapping[str, Any], architecture: Architecture) -> None:
    known = {*_HARMLESS.split(), 'architectures'} | architecture.harmless | _NO_VALUE.keys()
    known |= architecture.fields.keys() | architecture.values.keys() | architecture.inputs.keys()
    if unknown := {name: schema.shown(value) for name, value in config.items() if name not in known}:
        shown = ', '.join(
            f'{name if name.isidentifier() else schema.shown(name)} = {value}' for name, value in unknown.items()
        )
        if architecture.refuses_unknown_fields:
            raise UserError(
                f'{file} has unknown fields that may change what the model computes: {shown}: remove those that do not.'
            )
        warning.once(f'{file} has unknown fields that may change what the model computes: {shown}.')
    for name, ours in architecture.inputs.items():
        if config.get(name, ours) not in (ours, [ours]):
            warning.once(f'{file}: {name} is {schema.shown(config[name])}, but our pipelines use {ours}.')
    architecture.warn(file, config)
    named = config.get('architectures', [])
    names = named if schema.fits(named, list[str]) else [str(named)]
    if unknown_classes := [name for name in names if not name.endswith(architecture.classes)]:
        shown = schema.shown(unknown_classes)
        warning.once(f'{file}: architectures is {shown}: it is read as {architecture.classes[0]}.')
