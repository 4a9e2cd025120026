"""Surgery: a dense tree becomes an MoE tree. plan (names and shapes) -> execute (leaf by leaf) -> receipt (what was done).

Trees are flat here, '/'-joined names to leaves: `params/layers_1/mlp/wi_0/kernel`, `opt_state/count`, `step`, `rng`.
"""
