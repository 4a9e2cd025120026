"""Random decoder-only models of the transformers library, their folders, and their logits there and here.

Needs PyTorch (`pip install upcycle[hf]`; the CPU build is enough): import it after `pytest.importorskip`.
"""

import json

import jax
import numpy as np
import torch
import transformers

import upcycle
from tests.moe.quick import jit

# pytest's workers share the cores.
torch.set_num_threads(1)

LENGTH = 20
# Documents of the packed row.
SPLIT = 7
# Of router logits, above what rounding changes.
MARGIN = 1e-3
SIZES = {
    'vocab_size': 83,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
    'pad_token_id': 0,
    'bos_token_id': 1,
    'eos_token_id': 2,
}
# Kernels for experts need aligned sizes.
EAGER = {'attn_implementation': 'eager', 'experts_implementation': 'eager'}
INPUTS = ('plain', 'right', 'left', 'packed')


def make(kind, seed=0, dtype=torch.float32, **fields):
    """Makes a random model with the configuration class `kind`Config, on which every norm and bias shows."""
    config = getattr(transformers, f'{kind}Config')(**{**SIZES, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **EAGER)
    randomize(model, seed, centre=0.0 if kind.startswith('Gemma') else 1.0)
    return model.eval()


def randomize(model, seed, centre):
    """Draws all parameters: matrices of variance 1 / inputs, norms around `centre`, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith('norm.weight'):
                parameter.copy_(centre + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif 'embed_tokens' in name:
                parameter.copy_(0.3 * noise)
            else:
                # Routers are wider, so that rounding does not change their choice.
                width = 2.0 if 'gate.weight' in name or 'router' in name else 1.0
                parameter.copy_(width * noise / parameter.shape[-1] ** 0.5)


def margin(model, tokens):
    """The smallest difference between the router logits of the last chosen and the first other expert; 1 without experts."""
    count = getattr(model.config, 'num_experts', None) or getattr(model.config, 'num_local_experts', None)
    if count is None or count == (top := model.config.num_experts_per_tok):
        return 1.0
    found = []

    def record(module, arguments, output):
        for logits in output if isinstance(output, tuple) else (output,):
            if torch.is_tensor(logits) and logits.shape[-1] == count and logits.is_floating_point():
                ordered = logits.float().sort(descending=True).values
                found.append((ordered[..., top - 1] - ordered[..., top]).min().item())

    hooks = [
        module.register_forward_hook(record)
        for name, module in model.named_modules()
        if name.endswith(('.gate', '.router', '.router.layer'))
    ]
    theirs(model, tokens)
    for hook in hooks:
        hook.remove()
    assert found
    return min(found)


def make_with_margin(kind, **fields):
    """Makes a model whose routers' choices float rounding does not change, for the tokens of `tokens_of`."""
    for seed in range(50):
        model = make(kind, seed, **fields)
        if margin(model, tokens_of(model)) > MARGIN:
            return model
    raise AssertionError(f'no seed gives {kind} clear choices')


def tokens_with_margin(model):
    """Random tokens for which float rounding does not change the routers' choices."""
    for seed in range(50):
        if margin(model, tokens := tokens_of(model, seed=seed)) > MARGIN:
            return tokens
    raise AssertionError(f'no seed gives {type(model).__name__} clear choices')


def tokens_of(model, rows=2, seed=1):
    """Random tokens (rows, LENGTH)."""
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, (rows, LENGTH))


def theirs(model, tokens):
    """Logits of `INPUTS` by transformers: rows, padded on each side to `valid` tokens, and documents packed into a row.

    Returns:
      For each input the logits (rows, LENGTH, vocabulary), arbitrary at padding.
    """
    ids = torch.tensor(tokens)

    def logits(**inputs):
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits.float().numpy()

    out = {'plain': logits(input_ids=ids)}
    for side in ('right', 'left'):
        mask = torch.tensor(valid(side, tokens.shape))
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        out[side] = logits(input_ids=ids * mask, attention_mask=mask.long(), position_ids=positions)
    documents = [logits(input_ids=part) for part in (ids[:1, :SPLIT], ids[:1, SPLIT:])]
    out['packed'] = np.concatenate(documents, axis=1)
    return out


def valid(side, shape):
    """The mask (rows, LENGTH) of rows of 13 and LENGTH - 1 tokens, padded on a side."""
    lengths = np.asarray([13] + [shape[1] - 1] * (shape[0] - 1))[:, None]
    mask = np.arange(shape[1]) < lengths
    return mask if side == 'right' else mask[:, ::-1].copy()


def ours(folder, tokens, dtype=None):
    """Logits of `INPUTS` by our model; see `theirs`."""
    model, params = upcycle.load(folder, dtype=dtype)
    return logits_of(model, params, tokens)


def logits_of(model, params, tokens):
    """Logits of `INPUTS` by a model of ours; see `theirs`."""
    rows, length = tokens.shape
    masks = {side: valid(side, tokens.shape) for side in ('right', 'left')}
    every = np.ones((rows, length), bool)
    batch = {
        'tokens': np.concatenate([tokens, *(tokens * mask for mask in masks.values()), tokens[:1]]).astype(np.int32),
        'mask': np.concatenate([every, *masks.values(), every[:1]]),
        'segment_ids': np.ones((3 * rows + 1, length), np.int32),
    }
    batch['segment_ids'][-1, SPLIT:] = 2
    with jax.default_matmul_precision('highest'):
        logits = np.asarray(jit(model.logits)(params, batch))
    return dict(zip(INPUTS, np.split(logits, [rows, 2 * rows, 3 * rows]), strict=True))


def assert_equal_logits(found, expected, atol=1e-4):
    """Asserts that the logits of all `INPUTS` are equal at real tokens."""
    for name in INPUTS:
        shape = expected[name].shape[:2]
        mask = valid(name, shape) if name in ('right', 'left') else np.ones(shape, bool)
        np.testing.assert_allclose(found[name][mask], expected[name][mask], rtol=0, atol=atol, err_msg=name)


def to_hub_spelling(folder):
    """Rewrites config.json with the names of transformers 4, which most folders of the hub have."""
    file = folder / 'config.json'
    config = json.loads(file.read_text())
    config['torch_dtype'] = config.pop('dtype')
    rope = config.pop('rope_parameters', {})
    if 'full_attention' in rope:
        config['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
        rope = rope['full_attention']
    config['rope_theta'] = rope.pop('rope_theta')
    if 'partial_rotary_factor' in rope:
        config['partial_rotary_factor'] = rope.pop('partial_rotary_factor')
    config['rope_scaling'] = None if rope['rope_type'] == 'default' else rope
    if config['model_type'] == 'qwen3_moe':
        config['num_experts'] = config.pop('num_local_experts')
    file.write_text(json.dumps(config))


def load(folder):
    """Loads a folder with transformers, which must use every tensor of it and find every tensor of its model."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **EAGER
    )
    assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
    assert not info.get('error_msgs')
    return model.eval()
