"""Whether a run is well: steps that are not finite, losses that leap, experts and routers that have stopped working."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from upcycle.errors import UserError
from upcycle.metrics import warn

# A window of the log in which an expert has less than this share of an even share of the tokens, or a router this share of the
# entropy of an even choice, is one in which it has stopped working.
STARVED, SATURATED = 0.01, 0.01
# Root mean square of logsumexp of a router's logits: far beyond where a softmax is 0 or 1 to float rounding.
LARGEST_LOGITS = 50.0
# A spike is above the median by this share of it at least, however still the losses before were.
_LEAST_DEVIATION = 0.01


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a run puts up with, and what it does then. Gin macros in brackets.

    Attributes:
      max_skipped_steps: number of steps in a row that may be skipped because their loss or gradient is not finite; after one
        more the run stops [MAX_SKIPPED_STEPS].
      spike_deviations: d. A loss is a spike if it exceeds the median m of the losses before it by d times the larger of their
        standard deviation, estimated from the median absolute deviation, and m / 100. None: no loss is a spike
        [SPIKE_DEVIATIONS].
      spike_window: number of losses that the median is taken of [SPIKE_WINDOW].
      max_rollbacks: number of spikes at which a run returns to its newest checkpoint, or to its start, and leaves out the batches
        it has trained on since. Later spikes are only reported [MAX_ROLLBACKS].
    """

    max_skipped_steps: int = 10
    spike_deviations: float | None = 10.0
    spike_window: int = 100
    max_rollbacks: int = 0

    def __post_init__(self):
        for binding, value, least in (
            ('MAX_SKIPPED_STEPS', self.max_skipped_steps, 0),
            ('SPIKE_WINDOW', self.spike_window, 2),
            ('MAX_ROLLBACKS', self.max_rollbacks, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f'{binding} = {value!r} must be a whole number of at least {least}.')
        deviations = self.spike_deviations
        if deviations is not None and (not isinstance(deviations, int | float) or not deviations > 0):
            raise UserError(f'SPIKE_DEVIATIONS = {deviations!r} must be a number above 0, or None.')
        if deviations is None and self.max_rollbacks:
            raise UserError(
                f'MAX_ROLLBACKS = {self.max_rollbacks} is what to do at spikes, and SPIKE_DEVIATIONS = None looks for none: '
                'set both or neither.'
            )


class NotFiniteError(Exception):
    """More steps in a row than the limit were not finite: `first` up to `last`, none of which changed anything."""

    def __init__(self, first: int, last: int):
        super().__init__(f'steps {first} to {last} were not finite')
        self.first, self.last = first, last


class Rollback(Exception):  # noqa: N818  it is no error
    """The run is to go back to its newest checkpoint, since the loss of step `step` leapt."""

    def __init__(self, step: int):
        super().__init__(f'the loss of step {step} leapt')
        self.step = step


class Health:
    """Takes note of every step of a run, in order. What it remembers is plain, and saved with a checkpoint.

    Args:
      limits: what is put up with.
      values: as saved with that state; None: nothing has happened yet.
      quiet: print no warnings, as all processes but one.

    Attributes:
      step: the newest one seen.
      values: `skipped_steps`, `loss_spikes`, `rollbacks` and `batches_left_out`, all of the run so far; `in_a_row`, steps
        skipped since the last one that was not; `losses`, of the newest steps; `in_spike`; `warned`, of what was warned of and
        still holds.
    """

    COUNTS = ('skipped_steps', 'loss_spikes', 'rollbacks', 'batches_left_out')

    def __init__(self, limits: Limits, values: dict[str, Any] | None = None, *, quiet: bool = False):
        self.step = 0
        self._limits, self._quiet = limits, quiet
        nothing = dict.fromkeys(self.COUNTS, 0) | {'in_a_row': 0, 'losses': [], 'in_spike': False, 'warned': []}
        self.values = values or nothing

    @property
    def counts(self) -> dict[str, int]:
        """For the log."""
        return {name: self.values[name] for name in self.COUNTS}

    def see(self, metrics: Mapping[str, Any]) -> bool:
        """Takes note of the next step.

        Args:
          metrics: of `train_step`.

        Returns:
          Whether the step was taken, and not skipped.

        Raises:
          NotFiniteError: too many in a row were not.
          Rollback: its loss leapt.
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
        self._look_for_a_spike(loss)
        return True

    def leave_out(self, before: dict[str, Any], batches: int) -> None:
        """Books a rollback.

        Args:
          before: the values when it was called for, in which earlier rollbacks to the same checkpoint are counted.
          batches: taken since the checkpoint, which will not be taken again.
        """
        self.values |= {name: before[name] for name in self.COUNTS}
        self.values['rollbacks'] += 1
        self.values['batches_left_out'] += batches
        self._warn(f'back to this step, and on without the next {batches} batches (MAX_ROLLBACKS).')

    def look_at_routing(self, means: Mapping[str, Any]) -> dict[str, int]:
        """Warns of experts and routers that have stopped working, once for as long as they do not work.

        Args:
          means: of the metrics over a window of the log.

        Returns:
          How many they are, for the log; {} for a dense model.
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
                    'tokens: raise AUX_LOSS_FACTOR, or balance otherwise (docs/recipes.md).'
                )
            if found := saturation(means, layer):
                saturated += 1
                texts[f'{layer}/router'] = (
                    f'{found}: the router no longer weighs its choice, and hardly learns: set ROUTER_Z_LOSS_FACTOR, or lower '
                    'BASE_LEARNING_RATE.'
                )
        for name, text in texts.items():
            if name not in self.values['warned']:
                self._warn(text)
        self.values['warned'] = sorted(texts)
        return {'experts/starved_experts': starved, 'experts/saturated_routers': saturated}

    def _look_for_a_spike(self, loss: float) -> None:
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
            f'loss {loss:.4f} leaps from a median of {float(np.median(before)):.4f} over {len(before)} steps '
            '(SPIKE_DEVIATIONS); MAX_ROLLBACKS lets a run go back and leave such batches out.'
        )
        if values['rollbacks'] < limits.max_rollbacks:
            raise Rollback(self.step)

    def _warn(self, text: str) -> None:
        if not self._quiet:
            warn(f'step {self.step}: {text}')


def is_spike(loss: float, before: Sequence[float], deviations: float) -> bool:
    """Whether a loss leaps from those before; see `Limits`."""
    median = float(np.median(before))
    deviation = 1.4826 * float(np.median(np.abs(np.asarray(before) - median)))
    return loss > median + deviations * max(deviation, _LEAST_DEVIATION * abs(median))


def starved_experts(load_E: Sequence[float]) -> list[int]:
    """Experts that get nearly no tokens, by the share of the routed tokens at each."""
    return [expert for expert, share in enumerate(load_E) if share < STARVED / len(load_E)]


def saturation(means: Mapping[str, Any], layer: str) -> str | None:
    """What says that a layer's router chooses without weighing: the metric and its value; None: it does weigh.

    Args:
      means: metrics of the log.
      layer: such as 'experts/layers_1'.
    """
    even = math.log(len(means[f'{layer}/load']))
    entropy, z_loss = (means.get(f'{layer}/{name}') for name in ('router_entropy', 'router_z_loss'))
    if entropy is not None and entropy < SATURATED * even:
        return f'{layer}/router_entropy is {entropy:.2g} nats, less than {SATURATED:.0%} of an even choice ({even:.2f})'
    if z_loss is not None and z_loss > LARGEST_LOGITS**2:
        return f'{layer}/router_z_loss is {z_loss:.3g}, so logits are about {math.sqrt(z_loss):.0f}'
    return None
