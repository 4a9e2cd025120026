"""Surgery: converts a dense tree to an MoE tree. plan (names and shapes) -> execute (leaf by leaf) -> receipt.

Trees are flat dicts from '/'-joined names to leaves: `params/layers_1/mlp/wi_0/kernel`, `opt_state/count`, `step`, `rng`.
"""
