"""GGUF models as Hugging Face's: the content of `config.json`, and the tensors by the hub's names.

Matched: llama.cpp of October 2026, `conversion/` for what is written and `src/models/` for what is computed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from upcycle import schema
from upcycle.checkpoints import hf, views
from upcycle.errors import UserError

_WHOLE = {
    'token_embd.weight': 'model.embed_tokens.weight',
    'output_norm.weight': 'model.norm.weight',
    'output.weight': 'lm_head.weight',
}
_ROPE_FACTORS = 'rope_freqs.weight'
_ATTENTION = {
    'attn_norm': 'input_layernorm',
    **{f'attn_{part}': f'self_attn.{part}_proj' for part in 'qkv'},
    'attn_output': 'self_attn.o_proj',
    **{f'attn_{part}_norm': f'self_attn.{part}_norm' for part in 'qk'},
}
_MLP = {f'ffn_{part}': f'mlp.{part}_proj' for part in ('gate', 'up', 'down')}
_PRE_NORM = {**_ATTENTION, 'ffn_norm': 'post_attention_layernorm'}
_BOTH_NORMS = {
    **_ATTENTION,
    **_MLP,
    'post_attention_norm': 'post_attention_layernorm',
    'ffn_norm': 'pre_feedforward_layernorm',
    'post_ffw_norm': 'post_feedforward_layernorm',
}
# Experts are one tensor each there, whose numbers stand for the braces.
_MIXTRAL = {
    **_PRE_NORM,
    'ffn_gate_inp': 'block_sparse_moe.gate',
    'ffn_gate_exps': 'block_sparse_moe.experts.{}.w1',
    'ffn_down_exps': 'block_sparse_moe.experts.{}.w2',
    'ffn_up_exps': 'block_sparse_moe.experts.{}.w3',
}
_QWEN_MOE = {
    **_PRE_NORM,
    'ffn_gate_inp': 'mlp.gate',
    **{f'ffn_{part}_exps': f'mlp.experts.{{}}.{part}_proj' for part in ('gate', 'up', 'down')},
    **{f'ffn_{part}_shexp': f'mlp.shared_expert.{part}_proj' for part in ('gate', 'up', 'down')},
    'ffn_gate_inp_shexp': 'mlp.shared_expert_gate',
}


@dataclasses.dataclass(frozen=True)
class Model:
    """How llama.cpp stores and computes an architecture.

    Attributes:
      model_type: of `config.json`.
      names: the hub's names of the tensors of a layer.
      fields: fields of `config.json` by their keys in the metadata, with the value that llama.cpp takes if the key is missing;
        None: the key is required.
      config: other fields, as llama.cpp computes them; activations are the defaults.
      permuted: whether the rows of queries and keys are in the order of interleaved rotary positions.
      norm_offset: what is added to the scales of norms.
    """

    model_type: str
    names: Mapping[str, str]
    fields: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    permuted: bool = False
    norm_offset: float = 0.0


_EXPERTS = {
    'expert_used_count': ('num_experts_per_tok', None),
    'expert_feed_forward_length': ('moe_intermediate_size', None),
}
_CAPS = {
    'attn_logit_softcapping': ('attn_logit_softcapping', 50.0),
    'final_logit_softcapping': ('final_logit_softcapping', 30.0),
}
MODELS = {
    'llama': Model('llama', {**_PRE_NORM, **_MLP}, permuted=True),
    'qwen2': Model('qwen2', {**_PRE_NORM, **_MLP}, config={'use_sliding_window': False}),
    'qwen3': Model('qwen3', {**_PRE_NORM, **_MLP}, config={'use_sliding_window': False}),
    'qwen2moe': Model(
        'qwen2_moe',
        _QWEN_MOE,
        {**_EXPERTS, 'expert_shared_feed_forward_length': ('shared_expert_intermediate_size', None)},
        {'norm_topk_prob': False},
    ),
    'qwen3moe': Model('qwen3_moe', _QWEN_MOE, _EXPERTS, {'norm_topk_prob': True}),
    'gemma': Model('gemma', {**_PRE_NORM, **_MLP}, norm_offset=1.0),
    'gemma2': Model(
        'gemma2',
        _BOTH_NORMS,
        {'attention.sliding_window': ('sliding_window', 4096), **_CAPS},
        norm_offset=1.0,
    ),
    'gemma3': Model(
        'gemma3_text',
        _BOTH_NORMS,
        {
            'attention.sliding_window': ('sliding_window', 0),
            'rope.freq_base_swa': ('rope_local_base_freq', 10000.0),
            'final_logit_softcapping': _CAPS['final_logit_softcapping'][:1] + (0.0,),
        },
        norm_offset=1.0,
    ),
}
_MIXTRAL_MODEL = Model(
    'mixtral', _MIXTRAL, {'expert_used_count': ('num_experts_per_tok', None)}, {'sliding_window': None}, permuted=True
)
# The models whose attention has another scale than that of a head, by their number of layers; see `src/models/gemma{2,3}.cpp`.
_SCALED_BY_WIDTH = {'gemma2': 46, 'gemma3': 62}
_HARMLESS = {'vocab_size', 'rope.scaling.finetuned'}
_LLAMA3 = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}
_REQUIRED = object()


class _Values:
    """The metadata of an architecture; notes which keys were read."""

    def __init__(self, file: epath.Path, metadata: Mapping[str, Any], architecture: str):
        self._file, self._metadata, self.architecture = file, metadata, architecture
        self._read = {f'{architecture}.{key}' for key in _HARMLESS}

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns a value of the default's kind, a number if there is none; lists have one for each layer and must be equal."""
        name = f'{self.architecture}.{key}'
        self._read.add(name)
        value = self._metadata.get(name, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, np.ndarray | list):
            raise UserError(
                f'{name} of {self._file} differs between layers, which is not supported: use another model.'
            )
        if value is _REQUIRED:
            raise UserError(f'{self._file} has no {name} in its metadata: convert the model again with llama.cpp.')
        kind = type(default) if isinstance(default, str | bool) else float
        if not schema.fits(value, kind):
            raise self.unsupported(key, value, f'it must be {schema.in_words(kind)}')
        return value

    def require(self, key: str, ours: Any) -> None:
        """Refuses another value than ours."""
        value = self.get(key, ours)
        if value != ours:
            raise self.unsupported(key, value, f'supported is {schema.shown(ours)} only')

    def unsupported(self, key: str, value: Any, reason: str) -> UserError:
        return UserError(f'{self.architecture}.{key} of {self._file} is {schema.shown(value)}: {reason}.')

    def refuse_others(self) -> None:
        """Refuses keys of the architecture that were not read."""
        others = sorted(
            name for name in self._metadata if name.startswith(f'{self.architecture}.') and name not in self._read
        )
        if others:
            raise UserError(
                f'{self._file} has metadata that may change what the model computes: {others[0]} = '
                f'{schema.shown(self._metadata[others[0]])}: use another model.'
            )


def describe(
    file: epath.Path, metadata: Mapping[str, Any], tensors: Mapping[str, views.Lazy]
) -> tuple[dict[str, Any], dict[str, views.Lazy]]:
    """Returns the content of `config.json`, and the tensors by the hub's names.

    Args:
      file: for messages.
      metadata, tensors: see `container.read_file`.

    Raises:
      UserError: the architecture, a value or a tensor is not supported.
    """
    model, values = _model(file, metadata)
    if 'token_embd.weight' not in tensors:
        raise UserError(f'{file} has no tensor token_embd.weight: copy it again, or convert the model again.')
    config = _config(model, values, tensors)
    values.refuse_others()
    for ours, key in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding')):
        if schema.fits(number := metadata.get(f'tokenizer.ggml.{key}_token_id'), schema.Whole):
            config[f'{ours}_token_id'] = number
    named: dict[str, views.Lazy] = {}
    for name, tensor in tensors.items():
        if name != _ROPE_FACTORS:
            named |= _renamed(file, model, config, name, tensor)
    return config, named


def _model(file: epath.Path, metadata: Mapping[str, Any]) -> tuple[Model, _Values]:
    kind = metadata.get('general.type', 'model')
    if kind != 'model':
        raise UserError(f'{file} is not a model: its general.type is {schema.shown(kind)}: name the file of the model.')
    architecture = metadata.get('general.architecture')
    if not isinstance(architecture, str) or architecture not in MODELS:
        raise UserError(
            f'{file} has the general.architecture {schema.shown(architecture)}: only {", ".join(MODELS)} can be read.'
        )
    values = _Values(file, metadata, architecture)
    if architecture == 'llama' and values.get('expert_count', 0):
        return _MIXTRAL_MODEL, values
    return MODELS[architecture], values


def _config(model: Model, values: _Values, tensors: Mapping[str, views.Lazy]) -> dict[str, Any]:
    width, heads, layers = (values.get(key) for key in ('embedding_length', 'attention.head_count', 'block_count'))
    if not all(schema.fits(number, schema.Count) for number in (width, heads)):
        raise values.unsupported('attention.head_count', heads, 'it must be at least 1')
    head_dim = values.get('attention.key_length', width // heads)
    values.require('attention.value_length', head_dim)
    values.require('rope.dimension_count', head_dim)
    values.require('attention.causal', True)
    config = {
        'model_type': model.model_type,
        'vocab_size': tensors['token_embd.weight'].shape[0],
        'hidden_size': width,
        'num_hidden_layers': layers,
        'num_attention_heads': heads,
        'num_key_value_heads': values.get('attention.head_count_kv', heads),
        'head_dim': head_dim,
        'intermediate_size': values.get('feed_forward_length'),
        'rms_norm_eps': values.get('attention.layer_norm_rms_epsilon'),
        'max_position_embeddings': values.get('context_length'),
        'tie_word_embeddings': 'output.weight' not in tensors,
        **model.config,
        **{
            field: values.get(key, _REQUIRED if value is None else value)
            for key, (field, value) in model.fields.items()
        },
        **_rope(values, head_dim, tensors.get(_ROPE_FACTORS)),
    }
    experts = values.get('expert_count', 0)
    if experts and 'expert_used_count' in model.fields:
        config['num_local_experts' if model.model_type == 'mixtral' else 'num_experts'] = experts
    elif experts:
        raise values.unsupported('expert_count', experts, f'{values.architecture} has no experts')
    if not experts:
        values.require('expert_used_count', 0)
    config |= _biases(model, tensors)
    if values.architecture in _SCALED_BY_WIDTH:
        wide = layers == _SCALED_BY_WIDTH[values.architecture]
        config['query_pre_attn_scalar'] = width // heads if wide else head_dim
    if model.model_type == 'gemma3_text':
        config['sliding_window_pattern'] = 6 if config['sliding_window'] else 1
        config |= {name: config[name] or None for name in ('sliding_window', 'final_logit_softcapping')}
    return config


def _biases(model: Model, tensors: Mapping[str, views.Lazy]) -> dict[str, bool]:
    """Returns the fields that say which biases there are, as far as the layout has them."""
    attention, mlp = 'blk.0.attn_q.bias' in tensors, 'blk.0.ffn_up.bias' in tensors
    found = {'attention_bias': attention, 'qkv_bias': attention, 'mlp_bias': mlp}
    fields = hf.BY_MODEL_TYPE[model.model_type].fields
    return {name: value for name, value in found.items() if name in fields}


def _rope(values: _Values, head_dim: int, factors: views.Lazy | None) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling`.

    Raises:
      UserError: the scaling is not supported.
    """
    theta = values.get('rope.freq_base', 10000.0)
    kind = values.get('rope.scaling.type', 'none')
    factor = values.get('rope.scaling.factor', 0.0) or values.get('rope.scale_linear', 0.0)
    if factors is not None:
        if kind != 'none':
            raise values.unsupported('rope.scaling.type', kind, f'{_ROPE_FACTORS} is another scaling')
        return {'rope_theta': theta, 'rope_scaling': _llama3(values, theta, head_dim, factors.read(()))}
    if kind == 'none' and factor not in (0.0, 1.0):
        kind = 'linear'
    if kind == 'none':
        return {'rope_theta': theta}
    if kind not in ('linear', 'yarn'):
        raise values.unsupported('rope.scaling.type', kind, 'supported are none, linear and yarn')
    scaling = {'rope_type': kind, 'factor': factor}
    if kind == 'yarn':
        scaling['original_max_position_embeddings'] = values.get('rope.scaling.original_context_length')
        for key, default in (('beta_fast', 32.0), ('beta_slow', 1.0)):
            scaling[key] = values.get(f'rope.scaling.yarn_{key}', default)
    return {'rope_theta': theta, 'rope_scaling': scaling}


def _llama3(values: _Values, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any] | None:
    """Returns the scaling of Llama 3 whose divisors of the frequencies a file holds; None if all are 1.

    The file holds the divisors instead of the settings. All published models have those of `_LLAMA3` but for the factor.
    """
    if (factors == 1).all():
        return None
    factor = float(factors.max())
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, length = _LLAMA3.values()
    kept = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise values.unsupported(
            'rope.freq_base', theta, f'{_ROPE_FACTORS} is not the scaling of Llama 3 with its settings, {_LLAMA3}'
        )
    return {'rope_type': 'llama3', 'factor': factor, **_LLAMA3}


def _renamed(
    file: epath.Path, model: Model, config: Mapping[str, Any], name: str, tensor: views.Lazy
) -> dict[str, views.Lazy]:
    """Returns a tensor by its name on the hub, in the hub's order of rows, or the tensors of its experts."""
    match = re.fullmatch(r'blk\.(\d+)\.(\w+)\.(weight|bias)', name)
    if name not in _WHOLE and (match is None or match[2] not in model.names):
        raise UserError(f'{file} has the tensor {name}, which {model.model_type} does not have: use another model.')
    if match is None:
        return {_WHOLE[name]: _shifted(tensor, model.norm_offset) if name == 'output_norm.weight' else tensor}
    number, part, kind = match.groups()
    theirs = f'model.layers.{number}.{model.names[part]}.{kind}'
    if part.endswith('norm'):
        return {theirs: _shifted(tensor, model.norm_offset)}
    if part in ('attn_q', 'attn_k') and model.permuted:
        heads = config['num_attention_heads' if part == 'attn_q' else 'num_key_value_heads']
        try:
            return {theirs: _unpermuted(tensor, heads)}
        except ValueError as error:
            raise UserError(f'{name} of {file} does not have {heads} heads ({error}): copy it again.') from error
    if part == 'ffn_gate_inp_shexp' and len(tensor.shape) == 1:
        return {theirs: views.SplitAxis(tensor, 0, 1)}
    if '{}' in theirs:
        return {theirs.format(i): views.Layer(tensor, 0, i) for i in range(tensor.shape[0])}
    return {theirs: tensor}


def _shifted(tensor: views.Lazy, offset: float) -> views.Lazy:
    """Returns the scales of a norm to which the file has added `offset`."""
    if not offset:
        return tensor
    shift = np.asarray(offset, tensor.dtype)
    return views.Computed(tensor.shape, tensor.dtype, (tensor,), lambda scale: scale - shift)


def _unpermuted(tensor: views.Lazy, heads: int) -> views.Lazy:
    """Returns rows in the hub's order: of a head of size N, row 2 i + j moves to row j * N / 2 + i."""
    by_head = views.SplitAxis(tensor, 0, heads)
    pairs = views.SplitAxis(by_head, 1, by_head.shape[1] // 2)
    axes = (0, 2, 1, *range(3, len(pairs.shape)))
    return views.JoinedAxes(views.JoinedAxes(views.Transposed(pairs, axes), 0), 0)
