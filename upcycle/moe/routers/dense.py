"""Dense training and sparse inference: DS-MoE (Pan et al. 2024, arXiv 2404.05567)."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from upcycle.moe.conventions import BalanceLoss, RouterType
from upcycle.moe.losses import mutual_information_loss
from upcycle.moe.routers.assigning import Assigned
from upcycle.moe.routers.base import MoE
from upcycle.moe.routers.top_k import TokenChoice, TopK
from upcycle.moe.routing import Across, Routing, Tokens, decided


@dataclasses.dataclass(frozen=True)
class Dense(TokenChoice):
    """All experts for every token in training, with a mutual-information loss; Top-K or a threshold at inference.

    Attributes:
      inference_threshold: at inference, tokens go to all experts with a higher probability; None for Top-K
        [INFERENCE_THRESHOLD].
    """

    assigns = False
    not_ragged = "the router 'dense' trains every expert"
    implied = {'balance_loss': BalanceLoss.MUTUAL_INFORMATION}

    router: RouterType = dataclasses.field(default=RouterType.DENSE, init=False)
    inference_threshold: float | None = None

    def _invalid(self) -> Iterator[str]:
        yield from super()._invalid()
        if self.inference_threshold is not None and not 0 < self.inference_threshold < 1:
            yield f'INFERENCE_THRESHOLD = {self.inference_threshold!r} must lie between 0 and 1, or be None.'

    def _choice_in_words(self) -> str:
        above = f'Top-{self.num_selected_experts}'
        if self.inference_threshold is not None:
            above = f'probability above {self.inference_threshold:g}'
        return f'all in training, {above} at inference'

    def when(self, *, training: bool) -> MoE:
        if training:
            return dataclasses.replace(self, inference_threshold=None)
        if self.inference_threshold is not None:
            return self
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TokenChoice) if f.init}
        return TopK(**shared, **self.implied)

    def capacity(self, tokens_per_group: int, *, training: bool) -> int:
        """Returns S, unless Top-K routes at inference."""
        now = self.when(training=training)
        return tokens_per_group if isinstance(now, Dense) else now.capacity(tokens_per_group, training=training)

    def assign(self, tokens: Tokens, capacity: int, across: Across, bias_E: jax.Array | None) -> Assigned:
        routing = everybody(tokens, self.inference_threshold)
        return Assigned(routing, mutual_information_loss(tokens, across), jnp.zeros(()), {})


def everybody(tokens: Tokens, threshold: float | None) -> Routing:
    """Routes every token to all experts, or to those with a probability above the threshold (DS-MoE inference)."""
    probs_GxSxE, may_route_GxS = tokens.probs_GxSxE, tokens.may_route_GxS
    G, S, E = probs_GxSxE.shape
    takes_GxSxE = jnp.broadcast_to(may_route_GxS[..., None], probs_GxSxE.shape)
    if threshold is not None:
        takes_GxSxE &= probs_GxSxE > threshold
    takes_GxExS = takes_GxSxE.swapaxes(1, 2)
    token_GxExS = jnp.where(takes_GxExS, jnp.broadcast_to(jnp.arange(S), (G, E, S)), S)
    if threshold is not None:
        token_GxExS = decided(token_GxExS)
    return Routing(token_GxExS, jnp.where(token_GxExS < S, probs_GxSxE.swapaxes(1, 2), 0.0))
