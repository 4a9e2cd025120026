"""Decoder-only language models of Hugging Face. Dense layouts are in the order in which they are tried for writing."""

from upcycle.checkpoints.hf.decoder_only.base import DecoderOnly
from upcycle.checkpoints.hf.decoder_only.llama import Llama

LAYOUTS: tuple[DecoderOnly, ...] = (Llama(),)
