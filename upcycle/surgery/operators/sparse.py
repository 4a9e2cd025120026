"""More experts out of a model that has some."""

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
    """What makes an expert worth copying."""

    UNIFORM = 'uniform'  # nothing: all get the same number of copies
    WEIGHT = 'weight'  # ||w||^2
    GRADIENT = 'gradient'  # mean ||g||^2, as the optimizer's second moments tell it
    SALIENCY = 'saliency'  # ||g|| * ||w||


@dataclasses.dataclass(frozen=True)
class Grow(Operator):
    """Expert Upcycling (Dwivedi et al. 2026, arXiv 2604.19835): more experts by duplication, in the middle of training.

    The experts that there are stay as they are and come first; each new one is a copy of one of them, and its router column a
    copy with a little noise. With `uniform`, and K and the capacity factor grown as E has, the function is the same; with K as it
    was, which keeps the cost of a token, a token may now visit two copies of one expert.

    Otherwise new copies go one by one to the expert with the most utility per copy. The paper averages squared gradients over
    batches; we take them from the optimizer's second moments, which are such an average, so that no data is needed. Its variant
    ||g||^2 / H is not here.

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
                f"NUM_EXPERTS = {num_experts} is no multiple of the checkpoint's {num_mlps} experts, which GROW_UTILITY = "
                "'uniform' copies equally often: change it, or choose them by another utility."
            )

    def measure(self, name: str, stacked: np.ndarray, size: int) -> np.ndarray:
        """Squared norms of the weights and of the gradients, (2, E)."""
        flat = stacked.reshape(stacked.shape[0], -1).astype(np.float64)
        if name.startswith('params/'):
            return np.stack([np.square(flat).sum(axis=1), np.zeros(len(flat))])
        # Where the moments are factored, they are means over what is not there.
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

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        (w,) = parents
        return w


@dataclasses.dataclass(frozen=True)
class Merge(Operator):
    """UpIT's expert expansion (Hui et al. 2024, arXiv 2410.01610, section 3.2): new experts by merging two that differ.

    The experts that there are stay as they are and come first. New ones come from the pairs of them with the least cosine
    similarity, the most dissimilar pair first, each pair once; UpIT searches for pairs with a genetic algorithm. The merge is of
    DARE's kind (Yu et al. 2024): of each expert's difference from a common base a random share p is dropped, the rest is divided
    by 1 - p, and the mean of the two is added to the base. An MoE checkpoint no longer holds the base that both came from, so it
    is the pair's mean here: with p = 0 the new expert is the mean, with p = 0.5 each weight is that of one parent or the mean.

    Attributes:
      drop: p, the share of the difference between two parents that is dropped; 0: their mean [MERGE_DROP].
    """

    name = 'merge'
    starts_from = Start.MOE

    drop: float = 0.5

    def __post_init__(self):
        if not 0 <= self.drop < 1:
            raise UserError(f'MERGE_DROP = {self.drop!r} must lie in [0, 1).')

    @property
    def measured(self) -> tuple[str, ...]:
        return ('params',)

    def check(self, num_experts: int, num_mlps: int) -> None:
        check_growth(self.name, num_experts, num_mlps)
        pairs = num_mlps * (num_mlps - 1) // 2
        if num_experts - num_mlps > pairs:
            raise UserError(
                f'NUM_EXPERTS = {num_experts} needs {num_experts - num_mlps} new experts, and the {num_mlps} of the checkpoint '
                f'make {pairs} pairs: set it to {num_mlps + pairs} at most.'
            )

    def measure(self, name: str, stacked: np.ndarray, size: int) -> np.ndarray:
        """Inner products, (E, E)."""
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
    """Raises UserError unless there are to be more experts than there are."""
    if num_experts <= num_mlps:
        raise UserError(
            f'EXPERT_OPERATOR = {operator!r} adds experts to the {num_mlps} of the checkpoint, and NUM_EXPERTS = {num_experts}: '
            'raise it.'
        )
