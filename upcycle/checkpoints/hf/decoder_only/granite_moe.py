"""GraniteMoE. Matched: configuration_granitemoe.py, modeling_granitemoe.py, and its entry of conversion_mapping.py."""

from __future__ import annotations

from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only.experts import Fused
from upcycle.checkpoints.hf.decoder_only.facts import Facts

_MULTIPLIERS = {
    'embedding_multiplier': 'embedding_multiplier',
    'residual_multiplier': 'residual_multiplier',
    'logits_scaling': 'logits_divisor',
}


class GraniteMoe(Fused):
    """See `WithExperts`. Every layer has experts."""

    title = 'GraniteMoE'
    model_types = ('granitemoe',)
    classes = ('GraniteMoeForCausalLM', 'GraniteMoeModel')
    fields = {**Fused.fields, **dict.fromkeys((*_MULTIPLIERS, 'attention_multiplier'), schema.Positive)}
    aliases = {'num_experts': 'num_local_experts'}
    defaults = {
        **Fused.defaults,
        **dict.fromkeys((*_MULTIPLIERS, 'attention_multiplier'), 1.0),
        'num_local_experts': 8,
        'num_experts_per_tok': 2,
        'attention_bias': False,
    }
    always_normalized = True

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        multipliers = {ours: float(config[theirs]) for theirs, ours in _MULTIPLIERS.items()}
        return super().facts(file, config) | multipliers | {'attention_scale': float(config['attention_multiplier'])}

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        scale = facts['attention_scale']
        return {
            **super().spell(facts),
            **{theirs: facts[ours] for theirs, ours in _MULTIPLIERS.items()},
            'attention_multiplier': facts['head_dim'] ** -0.5 if scale is None else scale,
        }
