"""Mistral. Matched: configuration_mistral.py, modeling_mistral.py."""

from __future__ import annotations

from typing import Any

from etils import epath

from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only import windows
from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly
from upcycle.checkpoints.hf.decoder_only.facts import Facts


class Mistral(DecoderOnly):
    """See `DecoderOnly`."""

    title = 'Mistral'
    model_types = ('mistral',)
    classes = ('MistralForCausalLM', 'MistralModel')
    fields = {**DecoderOnly.fields, **windows.FIELDS}
    defaults = {**DecoderOnly.defaults, 'num_key_value_heads': 8, 'sliding_window': 4096}

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        return super().facts(file, config) | windows.of_all_layers(file, config)

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        return super().spell(facts) | {'sliding_window': facts['window']}
