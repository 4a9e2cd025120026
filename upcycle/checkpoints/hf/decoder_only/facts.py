"""The description of a decoder-only model in the metadata: fields of its network's configuration, as JSON.

Two descriptions of the same function are equal in their canonical form, by which layouts are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle import schema
from upcycle.checkpoints.hf.decoder_only import routing
from upcycle.errors import UserError

Facts = dict[str, Any]

FAMILY = 'llm'
SIZES = ('vocab_size', 'emb_dim', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_dim', 'num_layers')
# Fields that change the function, with the values of a network that has none of the options.
NEUTRAL: Mapping[str, Any] = {
    'mlp_activations': ['silu', 'linear'],
    'tied_embeddings': False,
    'norm_placement': 'pre',
    'norm_epsilon': 1e-6,
    'final_norm_epsilon': None,
    'norm_offset': 0.0,
    'qk_norm': 'none',
    'qkv_bias': False,
    'out_bias': False,
    'mlp_bias': False,
    'clip_qkv': None,
    'attention_scale': None,
    'attention_soft_cap': None,
    'logits_soft_cap': None,
    'embedding_multiplier': 1.0,
    'residual_multiplier': 1.0,
    'logits_divisor': 1.0,
    'window': None,
    'window_layers': 'all',
    'rope_theta': 10000.0,
    'rope_type': 'default',
    'rope_factor': 1.0,
    'rope_low_freq_factor': 1.0,
    'rope_high_freq_factor': 4.0,
    'rope_original_length': None,
    'rope_beta_fast': 32.0,
    'rope_beta_slow': 1.0,
    'rope_attention_factor': None,
    'rope_truncate': True,
    'rope_dims': None,
    'rope_layers': 'all',
    'window_rope_theta': None,
    'moe': None,
    'moe_layers': 'all',
    'moe_output_bias': False,
    'attention_moe': None,
}
# The fields of each type of scaling.
ROPE_FIELDS = {
    'default': (),
    'linear': ('rope_factor',),
    'llama3': ('rope_factor', 'rope_low_freq_factor', 'rope_high_freq_factor', 'rope_original_length'),
    'yarn': ('rope_factor', 'rope_original_length', 'rope_beta_fast', 'rope_beta_slow', 'rope_attention_factor')
    + ('rope_truncate',),
}
_OF_SCALING = tuple(dict.fromkeys(field for fields in ROPE_FIELDS.values() for field in fields))


def canonical(fields: Mapping[str, Any]) -> Facts:
    """Returns the fields that change the function, in the simplest form; others are dropped.

    Args:
      fields: all `SIZES`, and fields that differ from `NEUTRAL`.
    """
    facts = {name: fields[name] for name in SIZES}
    facts |= {name: fields.get(name, value) for name, value in NEUTRAL.items()}
    facts = {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}
    head_dim, layers = facts['head_dim'], facts['num_layers']
    facts['window_layers'] = chosen(facts['window_layers'], layers)
    if facts['window'] is None or facts['window_layers'] == 'none':
        facts |= {name: NEUTRAL[name] for name in ('window', 'window_layers', 'window_rope_theta')}
    facts['rope_layers'] = chosen(facts['rope_layers'], layers)
    if facts['rope_layers'] == 'none':
        facts |= {name: value for name, value in NEUTRAL.items() if name.startswith('rope_') and name != 'rope_layers'}
        facts['window_rope_theta'] = None
    unused = set(_OF_SCALING) - set(ROPE_FIELDS.get(facts['rope_type'], _OF_SCALING))
    facts |= {name: NEUTRAL[name] for name in unused}
    if facts['rope_type'] == 'default' and facts['window_rope_theta'] == facts['rope_theta']:
        facts['window_rope_theta'] = None
    for name, implied in (
        ('rope_dims', head_dim),
        ('attention_scale', head_dim**-0.5),
        ('final_norm_epsilon', facts['norm_epsilon']),
        ('rope_attention_factor', attention_factor(facts['rope_factor'])),
    ):
        if facts[name] is not None and math.isclose(facts[name], implied, rel_tol=1e-12):
            facts[name] = None
    attention = routing.canonical(facts['attention_moe'], 'all', facts['mlp_dim'], layers)
    facts |= routing.canonical(facts['moe'], facts['moe_layers'], facts['mlp_dim'], layers)
    facts['attention_moe'] = attention['moe']
    if facts['moe'] is None and facts['attention_moe'] is None:
        facts['moe_output_bias'] = False
    return facts


def compared(facts: Mapping[str, Any]) -> Facts:
    """Returns canonical facts, with those of MoE layers by single names, in a form that is equal for equal functions."""
    moe = facts['moe']
    if moe is None:
        return dict(facts)
    single = {**facts, 'moe': 'experts', **routing.compared(moe, facts['mlp_dim'])}
    if facts['moe_layers'] == 'all':
        del single['mlp_dim']  # no layer has that width
    return single


def attention_factor(factor: float, scale: float = 1.0) -> float:
    """Returns the factor of yarn's cosines and sines."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def chosen(layers: str | Sequence[int], depth: int) -> str | list[int]:
    """Returns 'all', 'none' or the sorted indices of the layers."""
    if isinstance(layers, str):
        return layers
    indices = sorted(set(layers))
    return 'none' if not indices else 'all' if indices == list(range(depth)) else indices


def indices(layers: str | Sequence[int], depth: int) -> list[int]:
    """Returns the indices of 'all', 'none' or a list of layers."""
    return list({'all': range(depth), 'none': ()}.get(layers, layers) if isinstance(layers, str) else layers)


def of_metadata(metadata: Mapping[str, Any]) -> Facts:
    """Returns the canonical facts of a checkpoint.

    Raises:
      UserError: the metadata does not describe the model.
    """
    config = metadata.get('model', {}).get('config', {})
    if missing := [name for name in SIZES if not schema.fits(config.get(name), schema.Count)]:
        raise UserError(
            f"the checkpoint's metadata lacks {missing[0]} of its model, without which it cannot be stored as huggingface: name "
            'a checkpoint of upcycle or a folder of Hugging Face.'
        )
    return canonical(config)
