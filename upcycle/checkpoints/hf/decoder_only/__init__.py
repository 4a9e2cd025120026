"""Decoder-only language models of Hugging Face, in the order in which layouts are tried for writing."""

from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly
from upcycle.checkpoints.hf.decoder_only.gemma import Gemma, Gemma2, Gemma3
from upcycle.checkpoints.hf.decoder_only.granite import Granite
from upcycle.checkpoints.hf.decoder_only.granite_moe import GraniteMoe
from upcycle.checkpoints.hf.decoder_only.jetmoe import JetMoe
from upcycle.checkpoints.hf.decoder_only.llama import Llama
from upcycle.checkpoints.hf.decoder_only.mistral import Mistral
from upcycle.checkpoints.hf.decoder_only.mixtral import Mixtral
from upcycle.checkpoints.hf.decoder_only.olmo2 import OLMo2
from upcycle.checkpoints.hf.decoder_only.olmo_moe import FlexOlmo, Olmoe
from upcycle.checkpoints.hf.decoder_only.phi3 import Phi3
from upcycle.checkpoints.hf.decoder_only.qwen import Qwen2, Qwen3
from upcycle.checkpoints.hf.decoder_only.qwen_moe import Qwen2Moe, Qwen3Moe
from upcycle.checkpoints.hf.decoder_only.smollm3 import SmolLM3

LAYOUTS: tuple[DecoderOnly, ...] = (
    *(Llama(), Mistral(), Qwen2(), Qwen3(), OLMo2(), Granite(), SmolLM3(), Gemma(), Gemma2(), Gemma3(), Phi3()),
    *(Mixtral(), Qwen3Moe(), Qwen2Moe(), FlexOlmo(), GraniteMoe(), Olmoe()),
    JetMoe(),
)
