"""Mixtral. Matched: configuration_mixtral.py, modeling_mixtral.py, and the `mixtral` entry of conversion_mapping.py."""

from __future__ import annotations

import re
from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only.experts import WithExperts
from upcycle.checkpoints.hf.decoder_only.facts import Facts

_BLOCK = re.compile(r'(model\.layers\.\d+)\.mlp\.')


class Mixtral(WithExperts):
    """See `WithExperts`. Every layer has experts, and perhaps a window."""

    title = 'Mixtral'
    model_types = ('mixtral',)
    classes = ('MixtralForCausalLM', 'MixtralModel')
    fields = {**WithExperts.fields, 'sliding_window': schema.Count}
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

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        return super().facts(file, config) | {'window': config.get('sliding_window')}

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        return super().spell(facts) | {'sliding_window': facts['window']}

    def rename(self, name: str) -> str:
        """Also takes the names of transformers' parameters; see `Architecture`."""
        return _BLOCK.sub(rf'\1.{self.block}.', super().rename(name))
