"""Qwen2-MoE and Qwen3-MoE, some of whose layers may be dense.

Matched: configuration_qwen2_moe.py, modeling_qwen2_moe.py, configuration_qwen3_moe.py, modeling_qwen3_moe.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etils import epath

from upcycle import schema
from upcycle.checkpoints.hf.architecture import LINEAR, Config, Entry
from upcycle.checkpoints.hf.decoder_only import windows
from upcycle.checkpoints.hf.decoder_only.experts import MATRICES, ZERO_SHARED_WIDTH, WithExperts
from upcycle.checkpoints.hf.decoder_only.facts import Facts, indices
from upcycle.checkpoints.hf.decoder_only.tensors import Leaf, linear

_NEARLY_ZERO = 1e-6


class _Qwen(WithExperts):
    """See `WithExperts`."""

    fields = {
        **WithExperts.fields,
        'moe_intermediate_size': schema.Count,
        'norm_topk_prob': bool,
        'decoder_sparse_step': schema.Count,
        'mlp_only_layers': Sequence[schema.Whole],
        'layer_types': Sequence[str],
    }
    values = {**WithExperts.values, 'use_sliding_window': False}
    harmless = WithExperts.harmless | {'sliding_window', 'max_window_layers'}
    aliases = {'num_local_experts': 'num_experts'}
    defaults = {
        **WithExperts.defaults,
        'decoder_sparse_step': 1,
        'mlp_only_layers': [],
        'norm_topk_prob': False,
    }
    width = 'moe_intermediate_size'

    def moe_facts(self, file: epath.Path, config: Config) -> Facts:
        """See `WithExperts`."""
        step, dense = config['decoder_sparse_step'], config['mlp_only_layers']
        layers = [i for i in range(config['num_hidden_layers']) if (i + 1) % step == 0 and i not in dense]
        return super().moe_facts(file, config) | {'moe_layers': layers}

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`. Versions of transformers differ in which layers have a window, so none is read."""
        return super().facts(file, config) | windows.of_some_layers(file, config, None, ())

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        depth = facts['num_layers']
        sparse = set(indices(facts['moe_layers'], depth))
        # The step with the fewest exceptions.
        candidates = []
        for step in range(1, depth + 1):
            listed = set(range(step - 1, depth, step))
            if sparse <= listed:
                candidates.append((len(listed - sparse), step, sorted(listed - sparse)))
        _, step, dense = min(candidates)
        return {
            **super().spell(facts),
            'decoder_sparse_step': step,
            'mlp_only_layers': dense,
            'use_sliding_window': False,
        }


class Qwen2Moe(_Qwen):
    """See `WithExperts`. It always has a shared expert and, in vLLM, biases: zeros are added to models without them."""

    title = 'Qwen2-MoE'
    model_types = ('qwen2_moe',)
    classes = ('Qwen2MoeForCausalLM', 'Qwen2MoeModel')
    fields = {**_Qwen.fields, 'qkv_bias': bool, 'shared_expert_intermediate_size': schema.Count}
    defaults = {
        **_Qwen.defaults,
        'num_key_value_heads': 16,
        'moe_intermediate_size': 1408,
        'shared_expert_intermediate_size': 5632,
        'num_experts_per_tok': 4,
        'num_experts': 60,
        'qkv_bias': True,
    }

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        return super().facts(file, config) | {'qkv_bias': config['qkv_bias'], 'out_bias': False}

    def moe_facts(self, file: epath.Path, config: Config) -> Facts:
        """See `WithExperts`."""
        facts = super().moe_facts(file, config)
        shared = {'num_shared_experts': 1, 'shared_mlp_dim': config['shared_expert_intermediate_size']}
        return facts | {'moe': {**facts['moe'], **shared, 'shared_gate': True}}

    def completed(self, facts: Facts) -> Facts:
        """See `DecoderOnly`."""
        if facts['moe'] is None or 'shared_mlp_dim' in facts['moe']:
            return facts | {'qkv_bias': True}
        shared = {'num_shared_experts': 1, 'shared_mlp_dim': ZERO_SHARED_WIDTH, 'shared_gate': True}
        return facts | {'qkv_bias': True, 'moe': facts['moe'] | shared}

    def constants(self, sizes: Config) -> dict[str, tuple[tuple[int, ...], float]]:
        """Returns zeros, but not for the gate of the shared expert, with which llama.cpp computes NaN; see `Architecture`."""
        constants = super().constants(sizes)
        return {
            name: (shape, _NEARLY_ZERO if '/shared_gate/' in name else value)
            for name, (shape, value) in constants.items()
        }

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        shared = facts['moe']['shared_mlp_dim']
        return super().spell(facts) | {'qkv_bias': facts['qkv_bias'], 'shared_expert_intermediate_size': shared}

    def experts(self, facts: Facts, ours: str, theirs: str) -> dict[str, Leaf]:
        """Returns the leaves of the experts and of the shared expert; see `WithExperts`."""
        leaves = super().experts(facts, ours, theirs)
        if 'shared_mlp_dim' not in facts['moe']:
            return leaves
        layer, width = ours.rpartition('/')[0], 'shared_expert_intermediate_size'
        for matrix, name in MATRICES.items():
            sizes = (width, 'hidden_size') if matrix == 'wo' else ('hidden_size', width)
            leaves |= linear(f'{layer}/shared/{matrix}', f'{theirs}.shared_expert.{name}', sizes, bias=False)
        gate = Entry(f'{theirs}.shared_expert_gate.weight', LINEAR)
        return leaves | {f'{layer}/shared_gate/kernel': Leaf(gate, ('hidden_size', '1'))}


class Qwen3Moe(_Qwen):
    """See `WithExperts`."""

    title = 'Qwen3-MoE'
    model_types = ('qwen3_moe',)
    classes = ('Qwen3MoeForCausalLM', 'Qwen3MoeModel')
    fields = {**_Qwen.fields, 'attention_bias': bool}
    defaults = {
        **_Qwen.defaults,
        'num_key_value_heads': 4,
        'moe_intermediate_size': 768,
        'num_experts_per_tok': 8,
        'num_experts': 128,
    }

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        return super().facts(file, config) | {'qk_norm': 'head'}
