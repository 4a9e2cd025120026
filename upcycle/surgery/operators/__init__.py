"""Operators: methods that make the experts of a Mixture-of-Experts layer. One dataclass per method, with its options as fields.

An operator makes one leaf of one expert at a time from the same leaf of the expert's parents. It identifies axes by their logical
names, so it works for kernels and biases, gated or not, of any family. It sees whole leaves, so that no statistic depends on the
mesh, and its random key depends only on the seed, the MLP's name and the expert's index.
"""

from upcycle.surgery.operators.base import Leaf, Leaves, Lineage, Operator, Start, key_for, look_up
from upcycle.surgery.operators.dense import Copy, Drop, Noise, Random
from upcycle.surgery.operators.fine_grained import Granular, Partial
from upcycle.surgery.operators.several import Branches
from upcycle.surgery.operators.sparse import Grow, Merge
from upcycle.surgery.operators.whole import Average, DenseOperator, Depth, Width

__all__ = [
    'DENSE_OPERATORS',
    'EXPERT_OPERATORS',
    'DenseOperator',
    'Leaf',
    'Leaves',
    'Lineage',
    'Operator',
    'Start',
    'key_for',
    'look_up',
]

KINDS = (Copy, Noise, Random, Drop, Granular, Partial, Branches, Grow, Merge)
EXPERT_OPERATORS: dict[str, type[Operator]] = {kind.name: kind for kind in KINDS}
DENSE_OPERATORS: dict[str, type[DenseOperator]] = {kind.name: kind for kind in (Depth, Width, Average)}
