"""Granite. Matched: configuration_granite.py, modeling_granite.py."""

from __future__ import annotations

from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly
from upcycle.checkpoints.hf.decoder_only.facts import Facts

# Fields with their names here.
_MULTIPLIERS = {
    'embedding_multiplier': 'embedding_multiplier',
    'residual_multiplier': 'residual_multiplier',
    'attention_multiplier': 'attention_scale',
    'logits_scaling': 'logits_divisor',
}


class Granite(DecoderOnly):
    """See `DecoderOnly`. A Llama with four multipliers; without its field, even that of attention is 1."""

    title = 'Granite'
    model_types = ('granite',)
    classes = ('GraniteForCausalLM', 'GraniteModel')
    fields = {
        **DecoderOnly.fields,
        **dict.fromkeys(('attention_bias', 'mlp_bias'), bool),
        **dict.fromkeys(_MULTIPLIERS, schema.Positive),
    }
    defaults = {**DecoderOnly.defaults, **dict.fromkeys(_MULTIPLIERS, 1.0)}

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        return super().facts(file, config) | {ours: float(config[name]) for name, ours in _MULTIPLIERS.items()}

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        multipliers = {name: facts[ours] for name, ours in _MULTIPLIERS.items()}
        if facts['attention_scale'] is None:
            multipliers['attention_multiplier'] = facts['head_dim'] ** -0.5
        return super().spell(facts) | multipliers
