"""Qwen2, Qwen2.5 and Qwen3. Matched: configuration_qwen2.py, configuration_qwen3.py, and their modeling files."""

from __future__ import annotations

from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only import windows
from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly
from upcycle.checkpoints.hf.decoder_only.facts import Facts


class Qwen2(DecoderOnly):
    """See `DecoderOnly`. The projections to queries, keys and values always have biases."""

    title = 'Qwen2'
    model_types = ('qwen2',)
    classes = ('Qwen2ForCausalLM', 'Qwen2Model')
    fields = {
        **DecoderOnly.fields,
        **windows.FIELDS,
        'use_sliding_window': bool,
        'max_window_layers': schema.Whole,
    }
    values = {name: value for name, value in DecoderOnly.values.items() if name != 'attention_bias'}
    defaults = {
        **DecoderOnly.defaults,
        'num_key_value_heads': 32,
        'use_sliding_window': False,
        'sliding_window': 4096,
        'max_window_layers': 28,
    }

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        window = config.get('sliding_window') if config['use_sliding_window'] else None
        implied = () if window is None else range(config['max_window_layers'], config['num_hidden_layers'])
        facts = super().facts(file, config) | windows.of_some_layers(file, config, window, implied)
        return facts | {'qkv_bias': True, 'out_bias': False}

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`. Versions of transformers before 4.53 read `max_window_layers` only."""
        layers = windows.layers_of(facts)
        return super().spell(facts) | {
            'use_sliding_window': bool(layers),
            'sliding_window': facts['window'],
            'max_window_layers': min(layers, default=facts['num_layers']),
            **windows.spell_types(facts),
        }


class Qwen3(Qwen2):
    """See `DecoderOnly`. Each head of queries and keys has a norm."""

    title = 'Qwen3'
    model_types = ('qwen3',)
    classes = ('Qwen3ForCausalLM', 'Qwen3Model')
    fields = {**Qwen2.fields, 'attention_bias': bool}
    defaults = {**Qwen2.defaults, 'head_dim': 128}

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        biases = dict.fromkeys(('qkv_bias', 'out_bias'), config.get('attention_bias', False))
        return super().facts(file, config) | biases | {'qk_norm': 'head'}
