"""SmolLM3. Matched: configuration_smollm3.py, modeling_smollm3.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only import windows
from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly
from upcycle.checkpoints.hf.decoder_only.facts import Facts, chosen, indices
from upcycle.errors import UserError


class SmolLM3(DecoderOnly):
    """See `DecoderOnly`. Some layers have no RoPE: those with 0 in `no_rope_layers`."""

    title = 'SmolLM3'
    model_types = ('smollm3',)
    classes = ('SmolLM3ForCausalLM', 'SmolLM3Model')
    fields = {
        **DecoderOnly.fields,
        **windows.FIELDS,
        **dict.fromkeys(('attention_bias', 'mlp_bias', 'use_sliding_window'), bool),
        'no_rope_layers': Sequence[Literal[0, 1]],
        'no_rope_layer_interval': schema.Count,
    }
    harmless = DecoderOnly.harmless | {'max_window_layers'}
    defaults = {
        **DecoderOnly.defaults,
        'num_key_value_heads': 4,
        'tie_word_embeddings': True,
        'use_sliding_window': False,
        'no_rope_layer_interval': 4,
    }
    rope_theta = 2_000_000.0

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        depth, interval = config['num_hidden_layers'], config['no_rope_layer_interval']
        turned = config.get('no_rope_layers', [int((i + 1) % interval != 0) for i in range(depth)])
        if len(turned) < depth:
            raise UserError(f'{file}: no_rope_layers has {len(turned)} entries, but num_hidden_layers is {depth}.')
        window = config.get('sliding_window') if config['use_sliding_window'] else None
        implied = [] if window is None else [i for i in range(depth) if not turned[i]]
        return {
            **super().facts(file, config),
            **windows.of_some_layers(file, config, window, implied),
            'rope_layers': chosen([i for i in range(depth) if turned[i]], depth),
        }

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        depth = facts['num_layers']
        turned = indices(facts['rope_layers'], depth)
        return super().spell(facts) | {
            'no_rope_layers': [int(i in turned) for i in range(depth)],
            'use_sliding_window': facts['window'] is not None,
            'sliding_window': facts['window'],
            **windows.spell_types(facts),
        }
