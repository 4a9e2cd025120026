"""What serving engines refuse or compute wrongly in a folder that transformers loads correctly.

The engines are vLLM 0.32 and llama.cpp of October 2026 with its `convert_hf_to_gguf.py`. Limits are from their sources (vLLM's
`model_executor/models/`, llama.cpp's `src/models/`); `scripts/serve_check.py` measures those of llama.cpp for mixtral, qwen2_moe,
qwen3_moe, granitemoe and olmoe. vLLM was not run. Not read in 0.32: vLLM's OLMoE beyond its router (an older version was read),
and that experts compute silu whatever `hidden_act` is, except in its qwen2_moe and granitemoe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from upcycle import warning
from upcycle.checkpoints.hf.architecture import Config
from upcycle.errors import UserError
from upcycle.formats import ENGINES

_, VLLM, LLAMA_CPP = ENGINES


@dataclasses.dataclass(frozen=True)
class Limit:
    """One limit of an engine.

    Attributes:
      engine: a member of `formats.ENGINES`.
      layouts: the values of `model_type` that it concerns.
      applies: whether a config.json is affected.
      sentence: what the engine does, with fields of config.json in braces.
    """

    engine: str
    layouts: tuple[str, ...]
    applies: Callable[[Config], bool]
    sentence: str


def _always(config: Config) -> bool:
    return True


def _is_true(field: str) -> Callable[[Config], bool]:
    return lambda config: bool(config.get(field))


def _is_not(field: str, value: Any) -> Callable[[Config], bool]:
    return lambda config: config.get(field, value) != value


def _own_head_dim(config: Config) -> bool:
    """Whether the width of a head does not follow from the other sizes."""
    return config.get('head_dim') not in (None, config['hidden_size'] / config['num_attention_heads'])


def _cuts_attention(config: Config) -> bool:
    """Whether the window is shorter than the longest text."""
    window = config.get('sliding_window')
    return window is not None and window < config.get('max_position_embeddings', math.inf)


def _some_dense(config: Config) -> bool:
    return config.get('decoder_sparse_step', 1) != 1 or bool(config.get('mlp_only_layers'))


def _renormalised(config: Config) -> bool:
    """Whether weights are divided by a sum that is not 1."""
    experts = config.get('num_experts') or config.get('num_local_experts')
    return bool(config.get('norm_topk_prob')) and config['num_experts_per_tok'] != experts


def _raw(config: Config) -> bool:
    experts = config.get('num_experts') or config.get('num_local_experts')
    return not config.get('norm_topk_prob') and config['num_experts_per_tok'] != experts


def _scaled_rope(config: Config) -> bool:
    return ((config.get('rope_scaling') or {}).get('rope_type')) == 'llama3'


_MOE = ('mixtral', 'qwen2_moe', 'qwen3_moe', 'olmoe', 'granitemoe')
_HEADS = 'ignores head_dim = {head_dim}: it computes hidden_size / num_attention_heads'
_BIASES = 'has no biases of attention layers (attention_bias = true)'
_ACTIVATION = 'computes silu in experts whatever hidden_act is ({hidden_act})'
_TIED = 'does not load a tied head (tie_word_embeddings = true): it looks for lm_head.weight'
_NO_NORM = 'never divides the weights of the chosen experts by their sum (norm_topk_prob = true)'

LIMITS: tuple[Limit, ...] = (
    Limit(VLLM, ('qwen2_moe', 'granitemoe', 'olmoe'), _own_head_dim, _HEADS),
    Limit(
        VLLM,
        ('qwen2_moe',),
        lambda config: not config.get('qkv_bias', True),
        'always has biases of queries, keys and values (qkv_bias = false): it stops because they are missing',
    ),
    Limit(VLLM, ('granitemoe', 'olmoe'), _is_true('attention_bias'), _BIASES),
    Limit(VLLM, _MOE, _is_not('hidden_act', 'silu'), _ACTIVATION),
    Limit(VLLM, ('olmoe',), _renormalised, _NO_NORM),
    Limit(
        VLLM,
        ('olmoe',),
        lambda config: config['rms_norm_eps'] != 1e-5,
        'computes norms with an epsilon of 1e-5 whatever rms_norm_eps is ({rms_norm_eps})',
    ),
    Limit(VLLM, ('olmoe',), _is_true('tie_word_embeddings'), _TIED),
    Limit(VLLM, ('olmoe',), _is_not('clip_qkv', None), 'ignores clip_qkv = {clip_qkv}'),
    Limit(VLLM, ('jetmoe',), _always, 'has jetmoe through its backend for transformers at best, which was not tried'),
    Limit(LLAMA_CPP, ('jetmoe',), _always, 'does not have the architecture jetmoe'),
    Limit(LLAMA_CPP, ('flex_olmo',), _always, 'does not have the architecture flex_olmo'),
    Limit(
        LLAMA_CPP,
        ('mixtral', 'mistral'),
        _cuts_attention,
        'ignores sliding_window = {sliding_window}: its results are wrong for longer texts',
    ),
    Limit(
        LLAMA_CPP,
        ('qwen2_moe', 'qwen3_moe'),
        _some_dense,
        'cannot convert layers without experts (decoder_sparse_step = {decoder_sparse_step}, mlp_only_layers = '
        '{mlp_only_layers})',
    ),
    Limit(LLAMA_CPP, ('qwen2_moe', 'olmoe'), _renormalised, _NO_NORM),
    Limit(
        LLAMA_CPP,
        ('qwen3_moe',),
        _raw,
        'always divides the weights of the chosen experts by their sum (norm_topk_prob = false)',
    ),
    Limit(LLAMA_CPP, ('qwen2_moe', 'olmoe'), _is_true('tie_word_embeddings'), _TIED),
    Limit(LLAMA_CPP, ('qwen2_moe', 'granitemoe', 'olmoe'), _own_head_dim, _HEADS),
    Limit(
        LLAMA_CPP,
        ('granitemoe',),
        _scaled_rope,
        'cannot convert rotary positions of the type llama3 in granitemoe (rope_scaling)',
    ),
    Limit(LLAMA_CPP, ('olmoe',), _is_true('attention_bias'), _BIASES),
    Limit(
        LLAMA_CPP,
        ('olmoe',),
        lambda config: config['num_key_value_heads'] != config['num_attention_heads'],
        'does not load grouped queries (num_key_value_heads = {num_key_value_heads}): it looks for a norm of all heads',
    ),
    Limit(LLAMA_CPP, ('olmoe',), _is_not('clip_qkv', None), 'ignores clip_qkv = {clip_qkv}'),
    Limit(LLAMA_CPP, _MOE, _is_not('hidden_act', 'silu'), _ACTIVATION),
)


def engine_limits(layout: str, config: Config) -> dict[str, list[str]]:
    """Returns what each engine refuses or computes wrongly, in sentences; engines without limits are left out.

    Args:
      layout: the `model_type`.
      config: the content of config.json, in the spelling of the hub.
    """
    found: dict[str, list[str]] = {}
    for limit in LIMITS:
        if layout in limit.layouts and limit.applies(config):
            found.setdefault(limit.engine, []).append(f'{limit.engine} {limit.sentence.format_map(config)}')
    return found


def report(limits: Mapping[str, list[str]], binding: Collection[str], path: str) -> None:
    """Warns about limits, or refuses those of binding engines.

    Args:
      limits: see `engine_limits`.
      binding: engines that must compute the model exactly.
      path: of the folder, for messages.

    Raises:
      UserError: a binding engine has limits.
    """
    if refused := [sentence for engine in binding for sentence in limits.get(engine, ())]:
        raise UserError(
            f'--for={",".join(binding)}: {"; ".join(refused)}. Choose another --layout, or leave the engine out of --for.'
        )
    for engine, sentences in limits.items():
        warning.once(f'{path} is exact in transformers, but {"; ".join(sentences)}: do not serve it with {engine}.')


def check_value(name: str, value: np.ndarray, binding: Collection[str], path: str) -> None:
    """Reports a limit that depends on the values of a leaf: llama.cpp divides by the product of a shared expert's gate.

    Args:
      name: of the leaf.
      value: of the leaf.
      binding, path: see `report`.

    Raises:
      UserError: see `report`.
    """
    if name.endswith('/shared_gate/kernel') and not value.any():
        report(
            {LLAMA_CPP: [f'{LLAMA_CPP} computes NaN if the gate of a shared expert is zero, as here']}, binding, path
        )
