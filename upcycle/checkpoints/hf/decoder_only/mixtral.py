"""Mixtral. Matched: configuration_mixtral.py, modeling_mixtral.py, and the `mixtral` entry of conversion_mapping.py."""

from __future__ import annotations

import re

from upcycle.checkpoints.hf.decoder_only.experts import WithExperts
from upcycle.checkpoints.hf.decoder_only.mistral import Mistral

_BLOCK = re.compile(r'(model\.layers\.\d+)\.mlp\.')


class Mixtral(WithExperts, Mistral):
    """See `WithExperts`. Every layer has experts, and perhaps a window."""

    title = 'Mixtral'
    model_types = ('mixtral',)
    classes = ('MixtralForCausalLM', 'MixtralModel')
    fields = {**Mistral.fields, **WithExperts.fields}
    aliases = {'num_experts': 'num_local_experts'}
    defaults = {
        **WithExperts.defaults,
        'rms_norm_eps': 1e-5,
        'num_key_value_heads': 8,
        'num_local_experts': 8,
        'num_experts_per_tok': 2,
    }
    rope_theta = 1e6
    block = 'block_sparse_moe'
    matrices = {'wi_0': 'w1', 'wi_1': 'w3', 'wo': 'w2'}
    count = 'num_local_experts'
    always_normalized = True

    def rename(self, name: str) -> str:
        """Also takes the names of transformers' parameters; see `Architecture`."""
        return _BLOCK.sub(rf'\1.{self.block}.', super().rename(name))
