"""A learned mean of the experts, on the way back to a dense model (XFT, Ding et al. 2024, arXiv 2404.15247, section 3.2)."""

import dataclasses
from collections.abc import Iterator

from upcycle.moe.conventions import RouterType
from upcycle.moe.routers.base import MoE, Routed
from upcycle.schema import Share


@dataclasses.dataclass(frozen=True)
class Merged(MoE):
    """One MLP, a mean of the experts with learned coefficients.

    Attributes:
      merged_shared_weight: share of shared experts in the mean [AVERAGE_SHARED_WEIGHT].
    """

    routes = False
    of_the_run_before = frozenset(field.name for field in dataclasses.fields(Routed))

    router: RouterType = dataclasses.field(default=RouterType.MERGED, init=False)
    merged_shared_weight: Share = 0.75

    def _invalid(self) -> Iterator[str]:
        yield from super()._invalid()
        if self.granularity > 1:
            yield (
                f'EXPERT_GRANULARITY = {self.granularity} makes experts parts of an MLP, and their mean is not an MLP: the '
                "router 'merged' needs EXPERT_GRANULARITY = 1."
            )

    def in_words(self) -> str:
        return f'{self.num_experts} experts, merged into one MLP'

    @property
    def active_experts(self) -> float:
        return 1
