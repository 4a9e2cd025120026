"""Gemma 1, 2 and 3 (text). Matched: configuration_gemma.py, configuration_gemma2.py, configuration_gemma3.py, modeling_*.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only import rope, windows
from upcycle.checkpoints.hf.decoder_only.base import ACTIVATIONS, DecoderOnly
from upcycle.checkpoints.hf.decoder_only.facts import Facts
from upcycle.errors import UserError

_TANH = 'gelu_pytorch_tanh'
_DEFAULTS = {name: value for name, value in DecoderOnly.defaults.items() if name != 'hidden_act'}
_WINDOW = 4096


class Gemma(DecoderOnly):
    """See `DecoderOnly`. The embeddings are scaled, and a norm multiplies by 1 plus its scale.

    `gelu` means the tanh approximation: files of 2024 say so.
    """

    title = 'Gemma'
    model_types = ('gemma',)
    classes = ('GemmaForCausalLM', 'GemmaModel')
    fields = {**DecoderOnly.fields, 'attention_bias': bool, 'hidden_activation': str}
    defaults = {
        **_DEFAULTS,
        'hidden_act': _TANH,
        'num_key_value_heads': 16,
        'head_dim': 256,
        'tie_word_embeddings': True,
    }
    activations = {**ACTIVATIONS, 'gelu': 'gelu'}

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        facts = super().facts(file, config)
        names = [config[name] for name in ('hidden_act', 'hidden_activation') if name in config]
        if len({Gemma.activations.get(name, name) for name in names}) > 1:
            raise UserError(
                f'{file}: hidden_act is {names[0]} and hidden_activation is {names[1]}: they must be the same activation.'
            )
        return facts | {'norm_offset': 1.0, 'embedding_multiplier': math.sqrt(config['hidden_size'])}


class Gemma2(Gemma):
    """See `DecoderOnly`. There are norms before and after each branch, soft caps, and windows in every other layer."""

    title = 'Gemma 2'
    model_types = ('gemma2',)
    classes = ('Gemma2ForCausalLM', 'Gemma2Model')
    fields = {
        **Gemma.fields,
        **windows.FIELDS,
        **dict.fromkeys(
            ('query_pre_attn_scalar', 'final_logit_softcapping', 'attn_logit_softcapping'), schema.Positive
        ),
    }
    defaults = {
        **_DEFAULTS,
        'hidden_activation': _TANH,
        'num_key_value_heads': 4,
        'head_dim': 256,
        'tie_word_embeddings': True,
        'query_pre_attn_scalar': 256,
        'sliding_window': _WINDOW,
        'final_logit_softcapping': 30.0,
        'attn_logit_softcapping': 50.0,
    }
    aliases = {'sliding_window_size': 'sliding_window'}
    activation_field = 'hidden_activation'
    activations = ACTIVATIONS
    whole_heads = True

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        layers = windows.of_some_layers(file, config, config.get('sliding_window'), self._windows(file, config))
        return {
            **super().facts(file, config),
            **layers,
            'norm_placement': 'both',
            'attention_scale': config['query_pre_attn_scalar'] ** -0.5,
            'attention_soft_cap': config.get('attn_logit_softcapping'),
            'logits_soft_cap': config.get('final_logit_softcapping'),
        }

    def _windows(self, file: epath.Path, config: Config) -> range:
        """Returns the layers with the window if the file has no `layer_types`."""
        return range(0, config['num_hidden_layers'], 2)

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`. The window is written even if no layer has it, since transformers makes its mask."""
        scale = facts['attention_scale']
        scalar = facts['head_dim'] if scale is None else round(scale**-2)
        return super().spell(facts) | {
            'query_pre_attn_scalar': max(scalar, 1),
            'sliding_window': facts['window'] or _WINDOW,
            **windows.spell_types(facts),
            'final_logit_softcapping': facts['logits_soft_cap'],
            'attn_logit_softcapping': facts['attention_soft_cap'],
        }


class Gemma3(Gemma2):
    """See `DecoderOnly`. Queries and keys have norms, and layers with the window a RoPE without scaling."""

    title = 'Gemma 3 (text)'
    model_types = ('gemma3_text',)
    classes = ('Gemma3ForCausalLM', 'Gemma3TextModel')
    fields = {
        **{name: kind for name, kind in Gemma2.fields.items() if name != 'attn_logit_softcapping'},
        'rope_local_base_freq': schema.Positive,
        **dict.fromkeys(('sliding_window_pattern', '_sliding_window_pattern'), schema.Count),
    }
    values = {**Gemma2.values, 'attn_logit_softcapping': None}  # read by no version of transformers
    defaults = {name: value for name, value in Gemma2.defaults.items() if not name.endswith('_softcapping')}
    rope_theta = 1_000_000.0

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        return super().facts(file, config) | {'qk_norm': 'head'}

    def rope(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`. `rope_parameters` has an entry for each type of layer."""
        parameters = config.get('rope_parameters', {})
        kinds = (windows.FULL, windows.SLIDING)
        if parameters.keys() - {*kinds} or not schema.fits(parameters, Mapping[str, Mapping[str, Any] | None]):
            raise UserError(
                f'{file}: rope_parameters must have only {" and ".join(kinds)}, each with its own parameters.'
            )
        if parameters and 'rope_scaling' in config:
            raise UserError(f'{file} has both rope_scaling and rope_parameters: remove one of them.')
        if config.get('rope_scaling', {}).keys() & {'type', 'rope_type'} == {'type'}:
            raise UserError(
                f'{file}: type of rope_scaling is ignored for Gemma 3 by transformers 5: name it rope_type if it is in use.'
            )
        local = {'rope_theta': config.get('rope_local_base_freq', 10_000.0)}
        full, sliding = (parameters.get(kind) or {} for kind in kinds)
        name = 'rope_parameters' if parameters else 'rope_scaling'
        facts = self._rope_of(file, name, full or config.get('rope_scaling', {}), config, self.rope_types)
        config = {field: value for field, value in config.items() if field != 'rope_theta'}
        theta = self._rope_of(file, f'{windows.SLIDING} of {name}', local | sliding, config, ('default',))['rope_theta']
        return facts | {'window_rope_theta': theta}

    def _rope_of(
        self, file: epath.Path, name: str, given: Mapping[str, Any], config: Config, types: Sequence[str]
    ) -> Facts:
        scaling = {'rope_theta': self.rope_theta, **rope.standard(file, name, given, config)}
        return rope.of_standard(file, name, scaling, config, types=types, partial=False)

    def _windows(self, file: epath.Path, config: Config) -> list[int]:
        """See `Gemma2`. transformers reads `_sliding_window_pattern` nowhere."""
        pattern = config.get('sliding_window_pattern', 6)
        if 'layer_types' not in config and config.get('_sliding_window_pattern', pattern) != pattern:
            raise UserError(
                f'{file}: _sliding_window_pattern is not {pattern}: set sliding_window_pattern or layer_types.'
            )
        return [i for i in range(config['num_hidden_layers']) if (i + 1) % pattern]

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        fields = super().spell(facts)
        del fields['attn_logit_softcapping']
        theta = facts['rope_theta'] if facts['window_rope_theta'] is None else facts['window_rope_theta']
        return fields | {'rope_local_base_freq': theta}
