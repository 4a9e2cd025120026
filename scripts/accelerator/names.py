"""Names of the rows. Imports no JAX, so that the process that starts the others does not hold the device."""

# By process: a row that ends its process ends no other.
ROWS = {
    'kernels': (
        'attention/all',
        'attention/causal, grouped heads',
        'attention/window',
        'attention/soft cap',
        'attention/packed',
        'attention/bias',
        'attention/bias, causal, 114 long',
        'attention/cross, padded',
        'grouped product/uniform',
        'grouped product/half for one expert',
        'cross entropy/all logits',
        'cross entropy/in parts',
    ),
    't5': ('t5/dense', 't5/gather', 't5/einsum', 't5/expert parallel'),
    'vit': ('vit/dense', 'vit/gather'),
    'llm': ('llm/dense', 'llm/ragged', 'llm/gather', 'llm/einsum', 'llm/expert parallel'),
    'online vit': ('online/vit',),
    'online llm': ('online/llm',),
}

# What a row of a step is compared with.
BASELINES = {
    't5/gather': 't5/dense',
    't5/einsum': 't5/dense',
    't5/expert parallel': 't5/gather',
    'vit/gather': 'vit/dense',
    'llm/ragged': 'llm/dense',
    'llm/gather': 'llm/dense',
    'llm/einsum': 'llm/dense',
    'llm/expert parallel': 'llm/ragged',
}
