"""JetMoE. Matched: configuration_jetmoe.py, modeling_jetmoe.py of transformers 5.24."""

from __future__ import annotations

from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import LINEAR, Config, Entry, Part
from upcycle.checkpoints.hf.decoder_only.base import Leaf
from upcycle.checkpoints.hf.decoder_only.experts import Fused
from upcycle.checkpoints.hf.decoder_only.facts import Facts

# Of the norms in layers, whatever `rms_norm_eps` is, which the last norm has.
_EPSILON = 1e-6
_KV = 'num_key_value_heads * kv_channels'


class JetMoe(Fused):
    """See `WithExperts`. Attention and MLP of every layer have experts, and biases of their outputs."""

    title = 'JetMoE'
    model_types = ('jetmoe',)
    classes = ('JetMoeForCausalLM', 'JetMoeModel')
    fields = {**Fused.fields, 'kv_channels': schema.Count, 'activation_function': str}
    aliases = {'head_dim': 'kv_channels'}
    defaults = {
        **Fused.defaults,
        'activation_function': 'silu',
        'kv_channels': 128,
        'num_experts_per_tok': 2,
        'num_key_value_heads': 16,
        'num_local_experts': 8,
        'tie_word_embeddings': True,
    }
    nullable = Fused.nullable - {'num_key_value_heads'}
    activation_field = 'activation_function'
    block = 'mlp'
    always_normalized = True
    balance = ('aux_loss_coef', 0.01)

    def resolve(self, file: epath.Path, config: dict[str, Any]) -> None:
        """Replaces `num_attention_heads`, which transformers computes; see `Architecture`."""
        config['head_dim'] = config['kv_channels']
        config['num_attention_heads'] = config['num_experts_per_tok'] * config['num_key_value_heads']
        super().resolve(file, config)

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        facts = super().facts(file, config)
        of_mlps = ('expert_mlp_dim', 'weight_scale')
        experts = {name: value for name, value in facts['moe'].items() if name not in of_mlps}
        return facts | {
            'attention_moe': experts,
            'moe_output_bias': True,
            'norm_epsilon': _EPSILON,
            'final_norm_epsilon': float(config['rms_norm_eps']),
        }

    def completed(self, facts: Facts) -> Facts:
        """See `DecoderOnly`."""
        return super().completed(facts) | {'moe_output_bias': True}

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        fields = super().spell(facts) | {'kv_channels': facts['head_dim']}
        del fields['head_dim']
        return fields | {'rms_norm_eps': facts['final_norm_epsilon'] or facts['norm_epsilon']}

    def dimensions(self, facts: Facts) -> dict[str, int]:
        """See `DecoderOnly`."""
        return super().dimensions(facts) | {_KV: facts['num_kv_heads'] * facts['head_dim']}

    def attention(self, facts: Facts, layer: int, ours: str, theirs: str) -> dict[str, Leaf]:
        """Returns the leaves of an attention layer. `kv_proj` has all keys, then all values; see `DecoderOnly`."""
        if facts['attention_moe'] is None:
            return super().attention(facts, layer, ours, theirs)
        theirs = f'{theirs.rpartition(".")[0]}.self_attention'
        count, hidden, width = facts['attention_moe']['num_experts'], facts['emb_dim'], self.dimensions(facts)[_KV]
        router = Entry(f'{theirs}.experts.router.layer.weight', LINEAR)
        leaves = {
            f'{ours}/router/router_weights/w/kernel': Leaf(router, ('hidden_size', self.count)),
            **_output_bias(facts, ours, f'{theirs}.experts'),
        }
        for i, part in enumerate(('key', 'value')):
            rows = Part((2 * width, hidden), (i * width, (i + 1) * width))
            entry = Entry(f'{theirs}.kv_proj.weight', LINEAR, (rows,))
            leaves[f'{ours}/{part}/kernel'] = Leaf(entry, ('hidden_size', _KV))
        for part, name, sizes, shape in (
            ('query', 'input_linear', ('hidden_size', _KV), (width, hidden)),
            ('out', 'output_linear', (_KV, 'hidden_size'), (hidden, width)),
        ):
            parts = tuple(Part((count, *shape), (0, shape[0]), e) for e in range(count))
            entry = Entry((f'{theirs}.experts.{name}.weight',) * count, LINEAR, parts)
            leaves[f'{ours}/expert/{part}/kernel'] = Leaf(entry, (self.count, *sizes))
        return leaves

    def mlp(self, facts: Facts, layer: int, ours: str, theirs: str) -> dict[str, Leaf]:
        """See `DecoderOnly`."""
        return super().mlp(facts, layer, ours, theirs) | _output_bias(facts, ours, theirs)


def _output_bias(facts: Facts, ours: str, theirs: str) -> dict[str, Leaf]:
    if not facts['moe_output_bias']:
        return {}
    return {f'{ours}/output_bias': Leaf(Entry(f'{theirs}.bias'), ('hidden_size',))}
