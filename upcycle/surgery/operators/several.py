"""Experts out of several dense checkpoints."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from upcycle.errors import UserError
from upcycle.surgery.operators.base import Leaves, Lineage, Operator, Start


@dataclasses.dataclass(frozen=True)
class Branches(Operator):
    """Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816): expert e is the MLP of checkpoint e, all other parameters are
    the mean over the checkpoints.

    The checkpoints may be models trained apart on domains of their own, their common seed as a generalist among them, or several
    of one run (UpIT's start, arXiv 2410.01610). With more experts than checkpoints, expert e comes from checkpoint e mod N (the
    baseline in Drop-Upcycling's code takes e // 2, which is the same up to the order of experts). N equal checkpoints are `copy`.
    """

    name = 'branches'
    starts_from = Start.SEVERAL

    def check(self, num_experts: int, num_mlps: int) -> None:
        if num_mlps < 2:
            raise UserError(
                "EXPERT_OPERATOR = 'branches' takes each expert from another checkpoint, and INITIAL_CHECKPOINT_PATH names one: "
                'name several, as in ("/run/a", "/run/b"), or use another operator.'
            )
        if num_experts % num_mlps:
            raise UserError(
                f'NUM_EXPERTS = {num_experts} is no multiple of the {num_mlps} checkpoints of INITIAL_CHECKPOINT_PATH: some '
                'would get more experts than others.'
            )

    def lineage(self, num_experts: int, num_mlps: int, measured: np.ndarray | None) -> Lineage:
        return tuple((e % num_mlps,) for e in range(num_experts))

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        (w,) = parents
        return w
