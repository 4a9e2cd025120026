"""Small folders with random weights in each layout that llama.cpp computes exactly, written by our exporter."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from upcycle.checkpoints import create_checkpoint, hf
from upcycle.checkpoints.hf import companions
from upcycle.checkpoints.hf.decoder_only import facts as facts_lib
from upcycle.formats import FolderRequest

LENGTH = 256  # of the models' texts
_SIZES = {'emb_dim': 64, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 16, 'mlp_dim': 96, 'num_layers': 3}
_LLAMA = {'norm_epsilon': 1e-5, 'tied_embeddings': True}
_LLAMA3 = {
    'head_dim': 24,
    'rope_type': 'llama3',
    'rope_theta': 5e5,
    'rope_factor': 8.0,
    'rope_high_freq_factor': 4.0,
    'rope_original_length': 64,
}
_QWEN3 = {'qk_norm': 'head', 'rope_theta': 1e6, 'tied_embeddings': True, 'head_dim': 24}
_EXPERTS = {
    'router': 'top_k',
    'num_experts': 4,
    'num_selected_experts': 2,
    'normalize_combine_weights': True,
    'dispatch': 'ragged',
    'expert_mlp_dim': 48,
}
_RAW = _EXPERTS | {'normalize_combine_weights': False}
_SHARED = {'num_shared_experts': 1, 'shared_mlp_dim': 64, 'shared_gate': True}
# Facts of each layout, by its model_type: of the dense model that is its control, and of the model with experts.
DENSE: Mapping[str, dict[str, Any]] = {'llama': _LLAMA | _LLAMA3, 'qwen3': _QWEN3}
LAYOUTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    'mixtral': ('llama', _LLAMA | _LLAMA3 | {'moe': _EXPERTS}),
    'granitemoe': ('llama', _LLAMA | {'moe': _EXPERTS}),
    'qwen3_moe': ('qwen3', _QWEN3 | {'moe': _EXPERTS}),
    'qwen2_moe': ('qwen3', {'qkv_bias': True, 'rope_theta': 1e6} | {'moe': _RAW | _SHARED}),
    'olmoe': ('qwen3', {'norm_epsilon': 1e-5, 'qk_norm': 'projection', 'num_kv_heads': 4, 'moe': _RAW}),
}
SENTENCE_PIECE = ('mixtral', 'granitemoe')  # layouts whose converter takes a tokenizer.model


def write(
    folder: pathlib.Path, layout: str, facts: Mapping[str, Any], tokenizer: pathlib.Path, vocabulary: int
) -> None:
    """Writes a folder with random weights.

    Args:
      folder: the new folder.
      layout: its model_type.
      facts: that differ from those of `facts.NEUTRAL`.
      tokenizer: folder with the tokenizer's files.
      vocabulary: number of tokens.
    """
    full = facts_lib.canonical({**_SIZES, 'vocab_size': vocabulary, **facts})
    architecture = hf.BY_MODEL_TYPE[layout]
    sizes = architecture.dimensions(full)
    shapes = {name: tuple(sizes[size] for size in leaf.sizes) for name, leaf in architecture.leaves(full).items()}
    metadata = {
        'family': architecture.family,
        'model': {'family': architecture.family, 'config': {**full, 'dtype': 'float32'}},
        'kept': {'max_position_embeddings': LENGTH, 'bos_token_id': 1, 'eos_token_id': 2},
        companions.KEY: str(tokenizer),
    }
    leaves = {f'params/{name}': jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    request = FolderRequest(layout)
    writer = create_checkpoint(
        folder, 'huggingface', leaves, step=None, identity={}, metadata=metadata, request=request
    )
    rng = np.random.default_rng(0)
    for name, leaf in leaves.items():
        value = _random(name, leaf.shape, rng)
        for region in writer.parts(name):
            writer.write(name, region, value[region])
    writer.finish(metadata)


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Returns weights with which activations and logits have a standard deviation of about 1."""
    drawn = rng.standard_normal(shape).astype(np.float32)
    if name.endswith('/scale'):
        return 1 + 0.1 * drawn
    if name.endswith('/bias'):
        return 0.1 * drawn
    return drawn / np.sqrt(np.float32(shape[-1] if name.endswith('/embedding') else shape[-2]))


def sentence_piece(folder: pathlib.Path, text: str, vocabulary: int) -> pathlib.Path:
    """Trains a SentencePiece model with byte fallback; returns its folder."""
    import sentencepiece

    folder.mkdir(parents=True)
    (folder / 'text').write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / 'text'),
        model_prefix=str(folder / 'tokenizer'),
        vocab_size=vocabulary,
        model_type='bpe',
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
    )
    return folder
