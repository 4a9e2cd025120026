"""Operators that add experts to a model with experts."""

import dataclasses
import enum
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from upcycle.errors import UserError, one_of
from upcycle.surgery.operators.base import Leaves, Lineage, Operator, Start, key_for


class Utility(enum.StrEnum):
    """The score by which experts are copied."""

    UNIFORM = 'uniform'  # all experts get the same number of copies
    WEIGHT = 'weight'  # ||w||^2
    GRADIENT = 'gradient'  # mean ||g||^2, from the optimizer's second moments
    SALIENCY = 'saliency'  # ||g|| * ||w||


@dataclasses.dataclass(frozen=True)
class Grow(Operator):
    """Expert Upcycling (Dwivedi et al. 2026, arXiv 2604.19835): adds experts by duplication in the middle of training.

    Old experts come first and are unchanged. Each new expert is a copy of an old one, and its router column is a copy with a
    little noise. With `uniform`, and K and the capacity factor scaled with E, the function is preserved. With K unchanged, which
    keeps the cost per token, a token may visit two copies of one expert.

    With the other utilities, each new copy goes to the expert with the highest utility per copy. The paper averages squared
    gradients over batches; here the optimizer's second moments provide that average, so no data is needed. The paper's variant
    ||g||^2 / H is not implemented.

    Attributes:
      utility: see `Utility` [GROW_UTILITY].
    """

    name = 'grow'
    starts_from = Start.MOE

    utility: Utility = Utility.UNIFORM

    def __post_init__(self):
        object.__setattr__(self, 'utility', one_of(Utility, self.utility, 'GROW_UTILITY'))

    @property
    def measured(self) -> tuple[str, ...]:
        return {
            Utility.UNIFORM: (),
            Utility.WEIGHT: ('params',),
            Utility.GRADIENT: ('opt_state',),
            Utility.SALIENCY: ('params', 'opt_state'),
        }[self.utility]

    def check(self, num_experts: int, num_mlps: int) -> None:
        check_growth(self.name, num_experts, num_mlps)
        if self.utility is Utility.UNIFORM and num_experts % num_mlps:
            raise UserError(
                f"NUM_EXPERTS = {num_experts} is not a multiple of the checkpoint's {num_mlps} experts, which GROW_UTILITY = "
                "'uniform' copies equally often: change it, or use another utility."
            )

    def measure(self, name: str, stacked: np.ndarray, size: int) -> np.ndarray:
        """Squared norms of the weights and of the gradients, (2, E)."""
        flat = stacked.reshape(stacked.shape[0], -1).astype(np.float64)
        if name.startswith('params/'):
            return np.stack([np.square(flat).sum(axis=1), np.zeros(len(flat))])
        # Factored moments are means over the missing axis.
        return np.stack([np.zeros(len(flat)), flat.mean(axis=1) * size])

    def lineage(self, num_experts: int, num_mlps: int, measured: np.ndarray | None) -> Lineage:
        if self.utility is Utility.UNIFORM:
            return tuple((e % num_mlps,) for e in range(num_experts))
        weight, gradient = measured
        utility = {
            Utility.WEIGHT: weight,
            Utility.GRADIENT: gradient,
            Utility.SALIENCY: np.sqrt(weight * gradient),
        }[self.utility]
        copies = np.ones(num_mlps)
        new = []
        for _ in range(num_experts - num_mlps):
            new.append(int(np.argmax(utility / copies)))
            copies[new[-1]] += 1
        return tuple((e,) for e in [*range(num_mlps), *new])


@dataclasses.dataclass(frozen=True)
class Merge(Operator):
    """UpIT's expert expansion (Hui et al. 2024, arXiv 2410.01610, section 3.2): adds experts by merging dissimilar pairs.

    Old experts come first and are unchanged. New experts come from the pairs with the lowest cosine similarity, the most
    dissimilar pair first, each pair once; UpIT searches for pairs with a genetic algorithm. The merge follows DARE (Yu et al.
    2024): a random fraction p of each expert's difference from a common base is dropped, the rest is divided by 1 - p, and the
    mean of the two is added to the base. An MoE checkpoint does not contain that base, so the pair's mean is used: with p = 0 the
    new expert is the mean, with p = 0.5 each weight is that of one parent or the mean.

    Attributes:
      drop: p, the fraction of the difference between two parents that is dropped; 0: their mean [MERGE_DROP].
    """

    name = 'merge'
    starts_from = Start.MOE

    drop: float = 0.5

    def __post_init__(self):
        if not 0 <= self.drop < 1:
            raise UserError(f'MERGE_DROP = {self.drop!r} must be in [0, 1).')

    @property
    def measured(self) -> tuple[str, ...]:
        return ('params',)

    def check(self, num_experts: int, num_mlps: int) -> None:
        check_growth(self.name, num_experts, num_mlps)
        pairs = num_mlps * (num_mlps - 1) // 2
        if num_experts - num_mlps > pairs:
            raise UserError(
                f'NUM_EXPERTS = {num_experts} needs {num_experts - num_mlps} new experts, and the {num_mlps} of the checkpoint '
                f'form {pairs} pairs: set it to at most {num_mlps + pairs}.'
            )

    def measure(self, name: str, stacked: np.ndarray, size: int) -> np.ndarray:
        """Inner products of the experts, (E, E)."""
        flat = stacked.reshape(stacked.shape[0], -1).astype(np.float32)
        return (flat @ flat.T).astype(np.float64)

    def lineage(self, num_experts: int, num_mlps: int, measured: np.ndarray | None) -> Lineage:
        norm = np.sqrt(np.maximum(np.diag(measured), 1e-30))
        cosine = measured / norm[:, None] / norm
        pairs = sorted(itertools.combinations(range(num_mlps), 2), key=lambda pair: cosine[pair])
        return (*((e,) for e in range(num_mlps)), *pairs[: num_experts - num_mlps])

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        if len(parents) == 1:
            return parents[0]
        first, second = parents
        mean, difference = (first + second) / 2, (first - second) / 2
        keys = jax.random.split(key_for(jax.random.fold_in(key, index), name))
        kept = [jax.random.uniform(k, first.shape) >= self.drop for k in keys]
        return mean + (kept[0].astype(jnp.float32) - kept[1]) * difference / (2 * (1 - self.drop))


def check_growth(operator: str, num_experts: int, num_mlps: int) -> None:
    """Raises UserError unless NUM_EXPERTS exceeds the number of experts in the checkpoint."""
    if num_experts <= num_mlps:
        raise UserError(
            f'EXPERT_OPERATOR = {operator!r} adds experts to the {num_mlps} of the checkpoint, and NUM_EXPERTS = {num_experts}: '
            'raise it.'
        )
