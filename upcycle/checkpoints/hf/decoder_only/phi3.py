"""Phi-3, whose projections are fused. Matched: configuration_phi3.py, modeling_phi3.py."""

from __future__ import annotations

from typing import Any

from etils import epath

from upcycle.checkpoints.hf.architecture import LINEAR, Config, Entry, Part
from upcycle.checkpoints.hf.decoder_only import rope, windows
from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly, Leaf
from upcycle.checkpoints.hf.decoder_only.facts import Facts


class Phi3(DecoderOnly):
    """See `DecoderOnly`. Rows of `qkv_proj` are queries, keys and values; those of `gate_up_proj` are gate and up."""

    title = 'Phi-3'
    model_types = ('phi3',)
    classes = ('Phi3ForCausalLM', 'Phi3Model')
    fields = {**DecoderOnly.fields, **windows.FIELDS}
    values = {**DecoderOnly.values, 'full_attn_mod': 1, 'interpolate_factor': 1}
    defaults = {**DecoderOnly.defaults, 'rms_norm_eps': 1e-5}
    rope_types = ('default',)
    partial_rope = True

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        return super().facts(file, config) | windows.of_all_layers(file, config)

    def spell(self, facts: Facts) -> dict[str, Any]:
        """See `DecoderOnly`."""
        return {**super().spell(facts), **rope.spell_share(facts), 'sliding_window': facts['window']}

    def attention(self, facts: Facts, layer: int, ours: str, theirs: str) -> dict[str, Leaf]:
        """See `DecoderOnly`."""
        return _fused(self, facts, super().attention(facts, layer, ours, theirs), 3, f'{theirs}.qkv_proj.weight')

    def mlp(self, facts: Facts, layer: int, ours: str, theirs: str) -> dict[str, Leaf]:
        """See `DecoderOnly`."""
        return _fused(self, facts, super().mlp(facts, layer, ours, theirs), 2, f'{theirs}.gate_up_proj.weight')


def _fused(layout: Phi3, facts: Facts, leaves: dict[str, Leaf], count: int, name: str) -> dict[str, Leaf]:
    """Returns the leaves with the tensors of the first `count`, of one width, joined under a name."""
    dimensions = layout.dimensions(facts)
    joined = list(leaves)[:count]
    rows = [dimensions[leaves[leaf].sizes[1]] for leaf in joined]
    shape = (sum(rows), facts['emb_dim'])
    for i, leaf in enumerate(joined):
        part = Part(shape, (sum(rows[:i]), sum(rows[: i + 1])))
        leaves[leaf] = Leaf(Entry(name, LINEAR, (part,)), leaves[leaf].sizes)
    return leaves
