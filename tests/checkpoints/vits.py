"""Trees of a small ViT under our names, and the same in the layouts of other programs."""

import re

import ml_dtypes
import numpy as np

WIDTH, HEADS, MLP, LAYERS, PATCH, GRID, CLASSES = 16, 2, 32, 3, 4, 3, 5
EXPERTS = 4


def ours(
    pooling: str = 'token', moe: tuple[int, ...] = (), seed: int = 0, representation: bool = False, dtype='float32'
):
    """Random parameters under our names, with their prefix `params/`."""
    depth = WIDTH // HEADS
    shapes = {
        'embedding/kernel': (PATCH, PATCH, 3, WIDTH),
        'embedding/bias': (WIDTH,),
        'pos_embedding': (1, GRID**2, WIDTH),
        'Transformer/encoder_norm/scale': (WIDTH,),
        'Transformer/encoder_norm/bias': (WIDTH,),
        'head/kernel': (WIDTH, CLASSES),
        'head/bias': (CLASSES,),
    }
    attention = {
        f'MultiHeadDotProductAttention_0/{name}': shape
        for part in ('query', 'key', 'value')
        for name, shape in ((f'{part}/kernel', (WIDTH, HEADS, depth)), (f'{part}/bias', (HEADS, depth)))
    }
    attention |= {
        'MultiHeadDotProductAttention_0/out/kernel': (HEADS, depth, WIDTH),
        'MultiHeadDotProductAttention_0/out/bias': (WIDTH,),
    }
    mlp = {
        'Dense_0/kernel': (WIDTH, MLP),
        'Dense_0/bias': (MLP,),
        'Dense_1/kernel': (MLP, WIDTH),
        'Dense_1/bias': (WIDTH,),
    }
    norms = {f'LayerNorm_{i}/{leaf}': (WIDTH,) for i in (0, 1) for leaf in ('scale', 'bias')}
    for layer in range(LAYERS):
        block = norms | attention
        if layer in moe:
            block |= {f'MlpBlock_0/expert/{name}': (EXPERTS, *shape) for name, shape in mlp.items()}
            block['MlpBlock_0/router/router_weights/w/kernel'] = (WIDTH, EXPERTS)
        else:
            block |= {f'MlpBlock_0/{name}': shape for name, shape in mlp.items()}
        shapes |= {f'Transformer/encoderblock_{layer}/{name}': shape for name, shape in block.items()}
    if pooling == 'token':
        shapes['cls'] = (1, 1, WIDTH)
    if pooling == 'map':
        head = attention | {f'LayerNorm_0/{leaf}': (WIDTH,) for leaf in ('scale', 'bias')}
        head |= {f'MlpBlock_0/{name}': shape for name, shape in mlp.items()}
        shapes |= {'MAPHead_0/probe': (1, 1, WIDTH)} | {f'MAPHead_0/{name}': shape for name, shape in head.items()}
    if representation:
        shapes |= {'pre_logits/kernel': (WIDTH, WIDTH), 'pre_logits/bias': (WIDTH,)}
    rng = np.random.default_rng(seed)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return {f'params/{name}': rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def vision_transformer(params, pre_linen: bool = True):
    """The layout of the published ImageNet-21k and AugReg files. Returns the file's arrays, and what must be read from them."""
    file, expected = {}, dict(params)
    for name, value in params.items():
        name = name.removeprefix('params/')
        if pre_linen:
            name = name.replace('/LayerNorm_1/', '/LayerNorm_2/').replace('/MlpBlock_0/', '/MlpBlock_3/')
            name = name.replace('/MultiHeadDotProductAttention_0/', '/MultiHeadDotProductAttention_1/')
        file[name] = value
    patches = file.pop('pos_embedding')
    # The token has a position, which ours has added to it.
    of_class = np.full((1, 1, WIDTH), 0.25, patches.dtype)
    file['Transformer/posembed_input/pos_embedding'] = np.concatenate([of_class, patches], axis=1)
    expected['params/cls'] = file['cls'] + of_class
    return file, expected


def vmoe(params):
    """V-MoE's names."""
    replacements = (
        (r'^params/Transformer/', 'Encoder/'),
        (r'^params/pos_embedding$', 'Encoder/posembed_input/pos_embedding'),
        (r'^params/', ''),
        (r'/MultiHeadDotProductAttention_0/', '/SelfAttention/'),
        (r'/MlpBlock_0/expert/', '/Moe/Mlp/'),
        (r'/MlpBlock_0/router/router_weights/w/', '/Moe/Router/dense/'),
        (r'/MlpBlock_0/', '/Mlp/'),
    )
    file = {}
    for name, value in params.items():
        if name.startswith('params/MAPHead_0/'):
            name = name.replace('params/MAPHead_0', 'MapHead').replace('_0/', '/').replace('MlpBlock', 'Mlp')
            name = name.replace('Dense/', 'Dense_0/')
        for pattern, replacement in replacements:
            name = re.sub(pattern, replacement, name)
        file[name] = value
    return file


def scanned(params):
    """big_vision's layout when it loops over layers: one stack for each leaf of a block."""
    file, stacks = {}, {}
    for name, value in params.items():
        match = re.match(r'params/Transformer/encoderblock_(\d+)/(.*)', name)
        if match:
            stacks.setdefault(match[2], {})[int(match[1])] = value
        else:
            file[name] = value
    return file | {
        f'params/Transformer/encoderblock/{name}': np.stack([layers[i] for i in range(LAYERS)])
        for name, layers in stacks.items()
    }
