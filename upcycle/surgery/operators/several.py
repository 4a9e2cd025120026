"""Operators that make experts from several dense checkpoints."""

import dataclasses
import enum

import numpy as np

from upcycle.errors import UserError, one_of
from upcycle.surgery.operators.base import Lineage, Operator, Start


class Rest(enum.StrEnum):
    """The source of the parameters outside MoE layers."""

    MEAN = 'mean'  # of all checkpoints, as in Branch-Train-MiX
    FIRST = 'first'  # the first checkpoint, as the base model of mergekit-moe


@dataclasses.dataclass(frozen=True)
class Branches(Operator):
    """Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816): expert e is the MLP of checkpoint e, the rest is averaged.

    The checkpoints can be models trained on separate domains, with their common seed model as a generalist, or several
    checkpoints of one run (the start of UpIT, arXiv 2410.01610). With more experts than checkpoints, expert e comes from
    checkpoint e mod N. The baseline in Drop-Upcycling's code uses e // 2, which differs only in the order of experts. N equal
    checkpoints give the same result as `copy`.

    Attributes:
      rest: see `Rest` [BRANCHES_REST].
    """

    name = 'branches'
    starts_from = Start.SEVERAL

    rest: Rest = Rest.MEAN

    def __post_init__(self):
        object.__setattr__(self, 'rest', one_of(Rest, self.rest, 'BRANCHES_REST'))

    @property
    def averages(self) -> bool:
        return self.rest is Rest.MEAN

    def check(self, num_experts: int, num_mlps: int) -> None:
        if num_mlps < 2:
            raise UserError(
                "EXPERT_OPERATOR = 'branches' needs several checkpoints, and INITIAL_CHECKPOINT_PATH names one: name several, as "
                'in ("/run/a", "/run/b"), or use another operator.'
            )
        if num_experts % num_mlps:
            raise UserError(
                f'NUM_EXPERTS = {num_experts} is not a multiple of the {num_mlps} checkpoints of INITIAL_CHECKPOINT_PATH: change '
                'it, so that all give the same number of experts.'
            )

    def lineage(self, num_experts: int, num_mlps: int, measured: np.ndarray | None) -> Lineage:
        return tuple((e % num_mlps,) for e in range(num_experts))
