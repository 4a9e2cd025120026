"""GGUF files for tests, written with the library `gguf` as llama.cpp's converter writes them."""

import json
import re

import gguf
import numpy as np

from tests.checkpoints import llms

ARCHITECTURES = {
    **{name: name for name in ('llama', 'qwen2', 'qwen3', 'gemma', 'gemma2')},
    'gemma3_text': 'gemma3',
    'mixtral': 'llama',
    'qwen2_moe': 'qwen2moe',
    'qwen3_moe': 'qwen3moe',
}
# What a fixture says that GGUF cannot, changed to what llama.cpp computes; `llms.copy` takes them.
EXPRESSIBLE = {
    'llama': {},
    'llama_bias': {},
    'llama_tied_rope_llama3': {
        'rope_parameters': {
            'rope_type': 'llama3',
            'rope_theta': 5e5,
            'factor': 32.0,
            'low_freq_factor': 1.0,
            'high_freq_factor': 4.0,
            'original_max_position_embeddings': 8192,
        }
    },
    'qwen2': {},
    'qwen3': {},
    'gemma': {},
    'gemma2': {'query_pre_attn_scalar': 12},
    'gemma3_text': {'query_pre_attn_scalar': 12, 'layer_types': ['sliding_attention'] * 4},
    'mixtral': {'sliding_window': None},
    'qwen2_moe_every_layer': {'norm_topk_prob': False},
    'qwen3_moe_norm': {},
}
# Keys of the metadata and fields of config.json.
FIELDS = {
    'block_count': 'num_hidden_layers',
    'vocab_size': 'vocab_size',
    'context_length': 'max_position_embeddings',
    'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'attention.head_count_kv': 'num_key_value_heads',
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
    'attention.key_length': 'head_dim',
    'attention.value_length': 'head_dim',
    'attention.sliding_window': 'sliding_window',
    'attn_logit_softcapping': 'attn_logit_softcapping',
    'final_logit_softcapping': 'final_logit_softcapping',
    'expert_used_count': 'num_experts_per_tok',
    'expert_feed_forward_length': 'moe_intermediate_size',
    'expert_shared_feed_forward_length': 'shared_expert_intermediate_size',
}


def write(file, metadata, tensors, kinds=None):
    """Writes a file.

    Args:
      file: its path.
      metadata: by key, with `general.architecture`.
      tensors: by their names there.
      kinds: the library's types of some of them, such as 'Q8_0'; others keep their own.
    """
    writer = gguf.GGUFWriter(file, metadata.get('general.architecture', ''))
    for key, value in metadata.items():
        if key == 'general.architecture':
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, value in tensors.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, 'F32')]
        if kind is gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def contents(folder):
    """Returns the metadata and tensors of a folder of the hub."""
    config = json.loads((folder / 'config.json').read_text())
    architecture = ARCHITECTURES[config['model_type']]
    metadata = {'general.architecture': architecture}
    used = {key: config[field] for key, field in FIELDS.items() if config.get(field) is not None}
    if architecture in ('llama', 'qwen2', 'qwen3') or architecture.endswith('moe'):
        used.pop('attention.sliding_window', None)
    metadata |= {f'{architecture}.{key}': value for key, value in used.items()}
    if experts := config.get('num_local_experts') or config.get('num_experts'):
        metadata[f'{architecture}.expert_count'] = experts
    parameters = config['rope_parameters']
    rope = parameters.get('full_attention', parameters)
    metadata[f'{architecture}.rope.freq_base'] = rope['rope_theta']
    if rope['rope_type'] == 'linear':
        metadata[f'{architecture}.rope.scaling.type'] = 'linear'
        metadata[f'{architecture}.rope.scaling.factor'] = rope['factor']
    stored = _joined_experts(llms.tensors_of(folder))
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config['num_hidden_layers']
    )
    tensors = {}
    for name, value in stored.items():
        theirs = names.get_name(name, try_suffixes=('.weight', '.bias'))
        assert theirs is not None, name
        if architecture == 'llama' and re.search(r'attn_[qk]\.', theirs):
            value = _permuted(value, config['num_attention_heads' if 'attn_q' in theirs else 'num_key_value_heads'])
        if architecture.startswith('gemma') and theirs.endswith('norm.weight'):
            value = value + np.float32(1)
        tensors[theirs] = value.reshape(-1) if theirs.endswith('shexp.weight') and len(value) == 1 else value
    if rope['rope_type'] == 'llama3':
        tensors['rope_freqs.weight'] = _divisors(rope, config['head_dim'])
    return metadata, tensors


def from_folder(folder, file, kinds=None, **metadata):
    """Writes a folder of the hub as a GGUF file, with more metadata."""
    fields, tensors = contents(folder)
    return write(file, fields | metadata, tensors, kinds)


def _permuted(value, heads):
    """The rows of queries or keys in the order of interleaved rotary positions."""
    return value.reshape(heads, 2, len(value) // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)


def _joined_experts(stored):
    """Tensors with those of the experts joined, by the names that the library maps."""
    joined, experts = {}, {}
    for name, value in stored.items():
        if match := re.fullmatch(r'(.*)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight', name):
            kind = {'w1': 'gate_proj', 'w2': 'down_proj', 'w3': 'up_proj'}.get(match[3], match[3])
            experts.setdefault(f'{match[1]}.mlp.experts.{kind}.weight', {})[int(match[2])] = value
        else:
            joined[name] = value
    return joined | {name: np.stack([rows[i] for i in sorted(rows)]) for name, rows in experts.items()}


def _divisors(rope, head_dim):
    """What llama.cpp's converter writes for the scaling of Llama 3."""
    found = []
    for frequency in rope['rope_theta'] ** (-np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        length, low, high = (
            rope[name] for name in ('original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor')
        )
        kept = (length / wavelength - low) / (high - low)
        inside = 1 / ((1 - kept) / rope['factor'] + kept)
        is_high, is_low = wavelength < length / high, wavelength > length / low
        found.append(1.0 if is_high else rope['factor'] if is_low else inside)
    return np.array(found, np.float32)
