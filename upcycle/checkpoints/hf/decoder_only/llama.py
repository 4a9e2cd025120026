"""Llama 1 to 3, and models that use its class, such as SmolLM2 and Yi. Matched: configuration_llama.py, modeling_llama.py."""

from __future__ import annotations

from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly


class Llama(DecoderOnly):
    """See `DecoderOnly`."""

    title = 'Llama'
    model_types = ('llama',)
    classes = ('LlamaForCausalLM', 'LlamaModel')
    fields = {**DecoderOnly.fields, 'attention_bias': bool, 'mlp_bias': bool}
    whole_heads = True
