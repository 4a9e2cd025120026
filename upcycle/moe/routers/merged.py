"""A learned mean of the experts, on the way back to a dense model (XFT, Ding et al. 2024, arXiv 2404.15247, section 3.2)."""

import dataclasses
from collections.abc import Iterator

from upcycle.errors import UserError
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
        if self.shared_gate:
            yield "SHARED_GATE weighs shared experts by token, and the router 'merged' makes one MLP for all: turn it off."

    def shared_width(self, mlp_dim: int) -> int:
        """See `MoE.shared_width`.

        Raises:
          UserError: the shared experts are not as wide as a routed one.
        """
        shared, expert = super().shared_width(mlp_dim), self.expert_width(mlp_dim)
        if shared not in (0, expert):
            raise UserError(
                f"the router 'merged' averages the shared experts, {shared} wide, with the others, {expert} wide: set "
                'NUM_SHARED_EXPERTS and SHARED_MLP_DIM for equal widths.'
            )
        return shared

    def in_words(self) -> str:
        return f'{self.num_experts} experts, merged into one MLP'

    @property
    def active_experts(self) -> float:
        return 1
