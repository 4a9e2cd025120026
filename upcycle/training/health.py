"""Health of a run: steps that are not finite, loss spikes, starved experts and saturated routers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from upcycle import schema
from upcycle.errors import UserError
from upcycle.schema import Bound, Positive, Whole
from upcycle.warning import warn

# An expert is starved if it gets less than this fraction of an even share of the tokens between two lines of the log; a router is
# saturated if its entropy is less than this fraction of that of a uniform choice.
STARVED, SATURATED = 0.01, 0.01
# Root mean square of the logsumexp of a router's logits; far below it a softmax is already 0 or 1 to float rounding.
LARGEST_LOGITS = 50.0
# A spike exceeds the median by at least this share of it, however little the losses before varied.
_LEAST_DEVIATION = 0.01


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a run stops or rolls back. Gin macros in brackets.

    Attributes:
      max_skipped_steps: number of steps in a row that may be skipped because their loss or gradient is not finite; one more
        stops the run [MAX_SKIPPED_STEPS].
      spike_deviations: d. A loss is a spike if it exceeds the median m of the losses before it by d times the larger of m / 100
        and their standard deviation, estimated from the median absolute deviation. None: no loss is a spike [SPIKE_DEVIATIONS].
      spike_window: number of losses that the median is computed from [SPIKE_WINDOW].
      max_rollbacks: number of spikes that return the run to its newest checkpoint (or its start) and skip the batches since;
        later spikes are only reported [MAX_ROLLBACKS].
    """

    max_skipped_steps: Whole = 10
    spike_deviations: Positive | None = 10.0
    spike_window: Annotated[int, Bound(lambda n: n >= 2, 'of at least 2')] = 100
    max_rollbacks: Whole = 0

    def __post_init__(self):
        schema.validate(self, {})
        if self.spike_deviations is None and self.max_rollbacks:
            raise UserError(
                f'MAX_ROLLBACKS = {self.max_rollbacks} needs SPIKE_DEVIATIONS, which is None: set SPIKE_DEVIATIONS or remove '
                'MAX_ROLLBACKS.'
            )


class NotFiniteError(Exception):
    """More steps in a row than allowed were not finite and so were skipped: `first` to `last`."""

    def __init__(self, first: int, last: int):
        super().__init__(f'steps {first} to {last} were not finite')
        self.first, self.last = first, last


class Rollback(Exception):  # noqa: N818  not an error
    """The run must return to its newest checkpoint, because the loss of step `step` is a spike."""

    def __init__(self, step: int):
        super().__init__(f'the loss of step {step} is a spike')
        self.step = step


class Health:
    """Observes every step of a run, in order. Its values are JSON, saved with every checkpoint.

    Args:
      limits: when the run stops or rolls back.
      values: as saved with a checkpoint; None: a new run.
      quiet: print no warnings (set in all processes but one).

    Attributes:
      step: the newest step seen.
      values: `skipped_steps`, `loss_spikes`, `rollbacks` and `batches_left_out`, counted over the whole run; `in_a_row`, steps
        skipped since the last one that was not; `losses` of the newest steps; `in_spike`; `warned`, the warnings that still
        hold.
    """

    COUNTS = ('skipped_steps', 'loss_spikes', 'rollbacks', 'batches_left_out')

    def __init__(self, limits: Limits, values: dict[str, Any] | None = None, *, quiet: bool = False):
        self.step = 0
        self._limits, self._quiet = limits, quiet
        new = dict.fromkeys(self.COUNTS, 0) | {'in_a_row': 0, 'losses': [], 'in_spike': False, 'warned': []}
        self.values = values or new

    @property
    def counts(self) -> dict[str, int]:
        """The counts for the log."""
        return {name: self.values[name] for name in self.COUNTS}

    def see(self, metrics: Mapping[str, Any]) -> bool:
        """Observes the next step.

        Args:
          metrics: of `train_step`.

        Returns:
          Whether the step was not skipped.

        Raises:
          NotFiniteError: too many steps in a row were not finite.
          Rollback: its loss is a spike.
        """
        self.step += 1
        values = self.values
        loss = float(metrics['loss'])
        if metrics['skipped']:
            values['skipped_steps'] += 1
            values['in_a_row'] += 1
            if values['in_a_row'] == 1:
                self._warn(
                    f'loss {loss:g}, gradient norm {float(metrics["gradient_norm"]):g}: not finite, so the step is skipped; '
                    f'the run stops after more than {self._limits.max_skipped_steps} of them in a row (MAX_SKIPPED_STEPS).'
                )
            if values['in_a_row'] > self._limits.max_skipped_steps:
                raise NotFiniteError(self.step - values['in_a_row'] + 1, self.step)
            return False
        values['in_a_row'] = 0
        self._check_for_spike(loss)
        return True

    def leave_out(self, before: dict[str, Any], batches: int) -> None:
        """Records a rollback.

        Args:
          before: the values at the spike, which count earlier rollbacks to the same checkpoint.
          batches: number of batches since the checkpoint, which are skipped.
        """
        self.values |= {name: before[name] for name in self.COUNTS}
        self.values['rollbacks'] += 1
        self.values['batches_left_out'] += batches
        self._warn(f'rolled back to this step; the next {batches} batches are skipped (MAX_ROLLBACKS).')

    def look_at_routing(self, means: Mapping[str, Any]) -> dict[str, int]:
        """Warns of starved experts and saturated routers, once until they recover.

        Args:
          means: means of the metrics since the last line of the log.

        Returns:
          Their numbers, for the log; {} for a dense model.
        """
        loads = [name for name in means if name.startswith('experts/') and name.endswith('/load')]
        if not loads:
            return {}
        starved, saturated, texts = 0, 0, {}
        for name in loads:
            layer = name.removesuffix('/load')
            if experts := starved_experts(means[name]):
                starved += len(experts)
                texts[name] = (
                    f'{name}: experts {", ".join(map(str, experts))} get less than {STARVED:.0%} of an even share of the '
                    'tokens: raise AUX_LOSS_FACTOR, or balance them in another way (docs/recipes.md).'
                )
            if reason := saturation(means, layer):
                saturated += 1
                texts[f'{layer}/router'] = (
                    f'{reason}: the router is saturated and hardly learns: set ROUTER_Z_LOSS_FACTOR, or lower '
                    'BASE_LEARNING_RATE.'
                )
        for name, text in texts.items():
            if name not in self.values['warned']:
                self._warn(text)
        self.values['warned'] = sorted(texts)
        return {'experts/starved_experts': starved, 'experts/saturated_routers': saturated}

    def _check_for_spike(self, loss: float) -> None:
        values, limits = self.values, self._limits
        if limits.spike_deviations is None:
            return
        before = values['losses'][-limits.spike_window :]
        values['losses'] = [*before[-limits.spike_window + 1 :], loss]
        was_in_spike = values['in_spike']
        values['in_spike'] = len(before) == limits.spike_window and is_spike(loss, before, limits.spike_deviations)
        if not values['in_spike'] or was_in_spike:
            return
        values['loss_spikes'] += 1
        self._warn(
            f'loss {loss:.4f} is a spike: the median of the last {len(before)} steps is {float(np.median(before)):.4f} '
            '(SPIKE_DEVIATIONS). With MAX_ROLLBACKS a run goes back and skips such batches.'
        )
        if values['rollbacks'] < limits.max_rollbacks:
            raise Rollback(self.step)

    def _warn(self, text: str) -> None:
        if not self._quiet:
            warn(f'step {self.step}: {text}')


def is_spike(loss: float, before: Sequence[float], deviations: float) -> bool:
    """Returns whether a loss is a spike after those before; see `Limits`."""
    median = float(np.median(before))
    deviation = 1.4826 * float(np.median(np.abs(np.asarray(before) - median)))
    return loss > median + deviations * max(deviation, _LEAST_DEVIATION * abs(median))


def starved_experts(load_E: Sequence[float]) -> list[int]:
    """Returns the experts that get almost no tokens, given each expert's share of the routed tokens."""
    return [expert for expert, share in enumerate(load_E) if share < STARVED / len(load_E)]


def saturation(means: Mapping[str, Any], layer: str) -> str | None:
    """Returns the metric that shows that a layer's router is saturated, and its value; None if it is not.

    Args:
      means: metrics of the log.
      layer: such as 'experts/layers_1'.
    """
    even = math.log(len(means[f'{layer}/load']))
    entropy, z_loss = (means.get(f'{layer}/{name}') for name in ('router_entropy', 'router_z_loss'))
    if entropy is not None and entropy < SATURATED * even:
        return (
            f'{layer}/router_entropy is {entropy:.2g} nats, less than {SATURATED:.0%} of a uniform choice ({even:.2f})'
        )
    if z_loss is not None and z_loss > LARGEST_LOGITS**2:
        return f'{layer}/router_z_loss is {z_loss:.3g}, so logits are about {math.sqrt(z_loss):.0f}'
    return None
