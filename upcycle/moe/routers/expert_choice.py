"""Expert Choice (paper, section 2; Zhou et al. 2022, arXiv 2202.09368)."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from upcycle.moe.conventions import RoutePadding, RouterType
from upcycle.moe.routers.assigning import Assigned, Assigning
from upcycle.moe.routing import Across, Routing, Tokens, decided, weighed


@dataclasses.dataclass(frozen=True)
class ExpertChoice(Assigning):
    """Every expert takes its most probable tokens of a group: balanced by construction, never causal."""

    not_ragged = 'Expert Choice has a fixed number of slots'

    router: RouterType = dataclasses.field(default=RouterType.EXPERT_CHOICE, init=False)

    def looks_ahead(self, prefix: str = '') -> Iterator[str]:
        yield (
            f"{prefix}ROUTER = 'expert_choice' lets an expert compare a token with later ones, which leaks the future in a "
            "causal stack: use 'top_k'."
        )

    def _choice_in_words(self) -> str:
        return 'Expert Choice'

    @property
    def active_experts(self) -> float:
        return self.train_capacity_factor

    def assign(self, tokens: Tokens, capacity: int, across: Across, bias_E: jax.Array | None) -> Assigned:
        takes_all = self.route_padding is not RoutePadding.SKIP
        takeable_GxS = jnp.ones_like(tokens.may_route_GxS) if takes_all else tokens.may_route_GxS
        zero = jnp.zeros(())
        return Assigned(best_tokens(tokens.scores_GxSxE, takeable_GxS, capacity), zero, zero, {})


def best_tokens(probs_GxSxE: jax.Array, takeable_GxS: jax.Array, capacity: int) -> Routing:
    """Returns the C most probable tokens of every expert."""
    _, S, _ = probs_GxSxE.shape
    # -1 is below every probability: padding is only taken when nothing else is left, and then removed.
    score_GxExS = jnp.where(takeable_GxS[..., None], probs_GxSxE, -1.0).swapaxes(1, 2)
    score_GxExC, token_GxExC = jax.lax.top_k(score_GxExS, capacity)
    return weighed(decided(jnp.where(score_GxExC >= 0, token_GxExC, S)), probs_GxSxE)
