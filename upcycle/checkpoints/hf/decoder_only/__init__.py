"""Decoder-only language models of Hugging Face, in the order in which layouts are tried for writing."""

from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly
from upcycle.checkpoints.hf.decoder_only.granite_moe import GraniteMoe
from upcycle.checkpoints.hf.decoder_only.jetmoe import JetMoe
from upcycle.checkpoints.hf.decoder_only.llama import Llama
from upcycle.checkpoints.hf.decoder_only.mixtral import Mixtral
from upcycle.checkpoints.hf.decoder_only.olmo_moe import FlexOlmo, Olmoe
from upcycle.checkpoints.hf.decoder_only.qwen_moe import Qwen2Moe, Qwen3Moe

LAYOUTS: tuple[DecoderOnly, ...] = (
    Llama(),
    *(Mixtral(), Qwen3Moe(), Qwen2Moe(), FlexOlmo(), GraniteMoe(), Olmoe()),
    JetMoe(),
)
