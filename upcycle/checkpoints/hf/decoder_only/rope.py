"""Rotary positions in config.json: `rope_theta` and `rope_scaling` of the hub, `rope_parameters` of transformers 5.

Matched: modeling_rope_utils.py of transformers 5.24, of whose types longrope, dynamic and proportional are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only.facts import ROPE_FIELDS, Facts, attention_factor
from upcycle.errors import UserError

# Fields of the scaling, with ours; others are read below.
_NAMES = {
    'factor': 'rope_factor',
    'low_freq_factor': 'rope_low_freq_factor',
    'high_freq_factor': 'rope_high_freq_factor',
    'original_max_position_embeddings': 'rope_original_length',
    'beta_fast': 'rope_beta_fast',
    'beta_slow': 'rope_beta_slow',
    'attention_factor': 'rope_attention_factor',
    'truncate': 'rope_truncate',
}
_KINDS = {
    **dict.fromkeys(('rope_theta', 'partial_rotary_factor'), schema.Positive),
    **dict.fromkeys(_NAMES, schema.Positive),
    'original_max_position_embeddings': schema.Count,
    'truncate': bool,
    **dict.fromkeys(('mscale', 'mscale_all_dim'), float),
    **dict.fromkeys(('rope_type', 'type'), str),
}
_REQUIRED = {'linear': ('factor',), 'llama3': ('factor', 'low_freq_factor', 'high_freq_factor')}


def read(file: epath.Path, config: Config, *, types: Sequence[str], theta: float, partial: bool) -> Facts:
    """Returns the facts of rotary positions.

    Args:
      file: for messages.
      config: the fields of the file.
      types: of scaling that the architecture has in transformers.
      theta: its default.
      partial: whether the architecture reads `partial_rotary_factor`.

    Raises:
      UserError: a field is unknown, contradicts another one, or has a value that our models do not support.
    """
    named = [name for name in ('rope_scaling', 'rope_parameters') if name in config] or ['rope_scaling']
    scalings = [standard(file, name, config.get(name, {}), config) for name in named]
    if scalings[0] != scalings[-1]:
        raise UserError(f'{file}: rope_scaling and rope_parameters are names of the same field and must be equal.')
    scaling = {'rope_theta': theta, **scalings[0]}
    return of_standard(file, named[0], scaling, config, types=types, partial=partial)


def standard(file: epath.Path, name: str, scaling: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Returns a field in the form of transformers 5, with `rope_theta` and `rope_type`, and without nulls.

    Raises:
      UserError: see `read`.
    """
    scaling = {key: value for key, value in scaling.items() if value is not None}
    kind = scaling.pop('type', None)
    if scaling.setdefault('rope_type', kind or 'default') != (kind or scaling['rope_type']):
        raise UserError(f'{file}: type and rope_type of {name} are names of the same field and must be equal.')
    for outside in ('rope_theta', 'partial_rotary_factor', 'original_max_position_embeddings'):
        if outside in config and scaling.setdefault(outside, config[outside]) != config[outside]:
            raise UserError(
                f'{file}: {outside} is {config[outside]}, and {scaling[outside]} in {name}: they must be equal.'
            )
    return scaling


def of_standard(
    file: epath.Path, name: str, scaling: Mapping[str, Any], config: Config, *, types: Sequence[str], partial: bool
) -> Facts:
    """Returns the facts of a field in the form of `standard`; see `read`."""
    rope_type = scaling['rope_type']
    if rope_type not in types:
        raise UserError(
            f'{file}: rope_type of {name} is {schema.shown(rope_type)}: our {config["model_type"]} supports '
            f'{", ".join(types)} only.'
        )
    for key, value in scaling.items():
        if key not in _KINDS:
            raise UserError(f'{file}: {name} has the unknown field {key} = {schema.shown(value)}.')
        if not schema.fits(value, _KINDS[key]):
            raise UserError(
                f'{file}: {key} of {name} is {schema.shown(value)}: it must be {schema.in_words(_KINDS[key])}.'
            )
    facts = {ours: scaling[theirs] for theirs, ours in _NAMES.items() if theirs in scaling}
    if lacking := [key for key in _REQUIRED.get(rope_type, ()) if key not in scaling]:
        raise UserError(f'{file}: {name} has the rope_type {rope_type} but no {lacking[0]}.')
    if rope_type == 'llama3' and scaling['high_freq_factor'] <= scaling['low_freq_factor']:
        raise UserError(
            f'{file}: high_freq_factor of {name} is {scaling["high_freq_factor"]}: it must be above low_freq_factor, '
            f'{scaling["low_freq_factor"]}.'
        )
    if 'rope_original_length' in ROPE_FIELDS[rope_type]:
        length = config.get('max_position_embeddings')
        if facts.setdefault('rope_original_length', length) is None:
            raise UserError(f'{file}: {name} has the rope_type {rope_type} but no original_max_position_embeddings.')
    if rope_type == 'yarn':
        facts |= _yarn(file, name, scaling, config, facts)
    facts = {ours: facts[ours] for ours in ROPE_FIELDS[rope_type] if ours in facts}
    facts = {ours: value if ours in _EXACT else float(value) for ours, value in facts.items()}
    facts |= {'rope_type': rope_type, 'rope_theta': float(scaling['rope_theta'])}
    share = scaling.get('partial_rotary_factor', 1.0)
    if share != 1 and not partial:
        raise UserError(f'{file}: partial_rotary_factor is {share}: our {config["model_type"]} supports 1.0 only.')
    return facts | {'rope_dims': _dims(file, config, share)}


_EXACT = ('rope_original_length', 'rope_truncate')


def _yarn(file: epath.Path, name: str, scaling: Mapping[str, Any], config: Config, facts: Facts) -> Facts:
    """Returns the facts of yarn that other fields imply."""
    factor = facts.get('rope_factor')
    if factor is None:
        if 'max_position_embeddings' not in config:
            raise UserError(f'{file}: {name} has the rope_type yarn but no factor.')
        factor = config['max_position_embeddings'] / facts['rope_original_length']
    attention = facts.get('rope_attention_factor')
    if attention is None:
        scales = [scaling.get('mscale'), scaling.get('mscale_all_dim')]
        numerator, denominator = scales if all(scales) else (1.0, 0.0)
        attention = attention_factor(factor, numerator) / attention_factor(factor, denominator)
    return {'rope_factor': factor, 'rope_attention_factor': attention}


def _dims(file: epath.Path, config: Config, share: float) -> int:
    """Returns the number of rotated dimensions of a head."""
    head_dim = config['head_dim']
    dims = int(head_dim * share)
    if share == 1 and head_dim % 2:
        raise UserError(f'{file}: the width of a head, head_dim, is {head_dim}: RoPE needs an even number.')
    if not 0 < dims <= head_dim or dims % 2:
        raise UserError(
            f'{file}: partial_rotary_factor is {share}, so that RoPE turns {dims} of the {head_dim} dimensions of a head: their '
            'number must be even.'
        )
    return dims


def spell(facts: Facts) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling`, which all versions of transformers and the engines read."""
    scaling = {
        theirs: facts[ours]
        for theirs, ours in _NAMES.items()
        if ours in ROPE_FIELDS[facts['rope_type']] and facts[ours] is not None
    }
    scaling |= {'rope_type': facts['rope_type']} if facts['rope_type'] != 'default' else {}
    return {'rope_theta': facts['rope_theta'], 'rope_scaling': scaling or None}


def spell_share(facts: Facts) -> dict[str, Any]:
    """Returns `partial_rotary_factor`, of which transformers rounds the product with `head_dim` down."""
    dims, head_dim = facts['rope_dims'] or facts['head_dim'], facts['head_dim']
    share = dims / head_dim
    return {'partial_rotary_factor': share if int(share * head_dim) == dims else math.nextafter(share, 1)}
