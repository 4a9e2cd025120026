"""OLMo 2. Matched: configuration_olmo2.py, modeling_olmo2.py."""

from __future__ import annotations

from etils import epath

from upcycle.checkpoints.hf.architecture import Config
from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly
from upcycle.checkpoints.hf.decoder_only.facts import Facts


class OLMo2(DecoderOnly):
    """See `DecoderOnly`. Norms act on the outputs of the branches, and on whole projections to queries and keys."""

    title = 'OLMo 2'
    model_types = ('olmo2',)
    classes = ('Olmo2ForCausalLM', 'Olmo2Model')
    fields = {**DecoderOnly.fields, 'attention_bias': bool}
    defaults = {**DecoderOnly.defaults, 'rms_norm_eps': 1e-5}

    def facts(self, file: epath.Path, config: Config) -> Facts:
        """See `DecoderOnly`."""
        return super().facts(file, config) | {'norm_placement': 'post', 'qk_norm': 'projection'}
