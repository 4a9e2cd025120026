"""The Mixture-of-Experts layer: routing -> dispatch -> experts -> combine.

Axis letters, used as shape suffixes everywhere (`x_GxSxD`):

    G  groups of tokens that compete for the same slots
    S  tokens in a group
    E  experts
    C  capacity: slots of one expert for one group
    K  experts that a token chooses (Top-K)
    D  model width
    F  MLP width
    B  batch, L sequence length, H heads

*Capacity factor* (`cf`) is the multiple; *capacity* is the number of slots. Mesh axes are `data`, `expert` and `model`.

The layer serves any model family: it knows the shape of a token and the module that is its expert, nothing else.
"""
