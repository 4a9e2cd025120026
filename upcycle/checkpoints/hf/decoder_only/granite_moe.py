"""GraniteMoE. Matched: configuration_granitemoe.py, modeling_granitemoe.py, and its entry of conversion_mapping.py."""

from __future__ import annotations

from upcycle.checkpoints.hf.decoder_only.experts import Fused
from upcycle.checkpoints.hf.decoder_only.granite import Granite


class GraniteMoe(Fused, Granite):
    """See `WithExperts`. Every layer has experts."""

    title = 'GraniteMoE'
    model_types = ('granitemoe',)
    classes = ('GraniteMoeForCausalLM', 'GraniteMoeModel')
    fields = {name: kind for name, kind in (Granite.fields | Fused.fields).items() if name != 'mlp_bias'}
    values = {**Granite.values, 'mlp_bias': False}
    aliases = {'num_experts': 'num_local_experts'}
    defaults = {**Granite.defaults, 'num_local_experts': 8, 'num_experts_per_tok': 2}
    always_normalized = True
