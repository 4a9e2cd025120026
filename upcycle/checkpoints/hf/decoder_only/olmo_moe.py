"""OLMoE and FlexOlmo. Matched: configuration_olmoe.py, modeling_olmoe.py, configuration_flex_olmo.py, modeling_flex_olmo.py."""

from __future__ import annotations

from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only.experts import WithExperts
from upcycle.checkpoints.hf.decoder_only.facts import Facts
from upcycle.checkpoints.hf.decoder_only.olmo2 import OLMo2


class Olmoe(WithExperts):
    """See `WithExperts`. Every layer has experts, and queries and keys are normalised over all heads."""

    title = 'OLMoE'
    model_types = ('olmoe',)
    classes = ('OlmoeForCausalLM', 'OlmoeModel')
    fields = {**WithExperts.fields, 'attention_bias': bool, 'norm_topk_prob': bool, 'clip_qkv': schema.Positive}
    aliases = {'num_local_experts': 'num_experts'}
    defaults = {
        **WithExperts.defaults,
        'rms_norm_eps': 1e-5,
        'num_experts': 64,
        'num_experts_per_tok': 8,
        'norm_topk_prob': False,
    }

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        clip = config.get('clip_qkv')
        clip = None if clip is None else float(clip)
        return super().facts(file, config) | {'qk_norm': 'projection', 'clip_qkv': clip}

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`. The norms have the width of the model, so the width of a head follows from it."""
        fields = super().spell(facts) | {'clip_qkv': facts['clip_qkv']}
        return {name: value for name, value in fields.items() if name != 'head_dim'}


class FlexOlmo(WithExperts, OLMo2):
    """See `WithExperts`. Every layer has experts; norms are on the outputs, and over all heads of queries and keys."""

    title = 'FlexOlmo'
    model_types = ('flex_olmo',)
    classes = ('FlexOlmoForCausalLM', 'FlexOlmoModel')
    fields = {**OLMo2.fields, **WithExperts.fields, 'norm_topk_prob': bool}
    aliases = {'num_local_experts': 'num_experts'}
    defaults = {
        **WithExperts.defaults,
        'num_experts': 7,
        'num_experts_per_tok': 5,
        'norm_topk_prob': False,
    }
    rope_theta = 500000.0
