"""Learning-rate schedules: functions of the step. They continue a dense run's schedule because its step continues."""

import dataclasses
import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp

from upcycle import schema
from upcycle.errors import UserError
from upcycle.schema import Count, Natural, Positive, Whole

Schedule = Callable[[jax.Array], jax.Array]


class Policy(enum.StrEnum):
    """Learning-rate policy of a run that starts from a dense checkpoint."""

    CONTINUE = 'continue'  # the dense schedule continues at the dense run's step: the paper's
    RESTART = 'restart'  # warm-up to a peak, then cosine decay: NVIDIA's (arXiv 2410.07524)
    MINIMUM = 'minimum'  # constant, at the dense run's last value


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """Settings of a learning-rate schedule, for a run with any first and last step.

    The schedule is a product of factors. T5X's, under its names: `constant` (base_learning_rate), `linear_warmup`
    (min(1, step / warmup_steps)), `rsqrt_decay` (1 / sqrt(max(step, warmup_steps))), `rsqrt_normalized_decay` (the same, scaled
    to 1 at warmup_steps), `cosine_decay` (from 1 at warmup_steps to 0 at the last step; T5X's restarts after a cycle).
    big_vision's: `rsqrt` (1 / sqrt(1 + (step - warmup_steps) / timescale), 1 before), `linear_cooldown` (to 0 over the last
    cooldown_steps). In vmoe's copy of these two, `rsqrt` is constant during the cooldown; in big_vision it is not.

    Attributes:
      factors: names of the factors, joined by '*': `constant`, `linear_warmup`, `rsqrt_decay`, `rsqrt_normalized_decay`,
        `cosine_decay`, `rsqrt`, `linear_cooldown` [LEARNING_RATE_FACTORS].
      base_learning_rate: value of the factor `constant` [BASE_LEARNING_RATE].
      warmup_steps: steps of warm-up, or until a decay begins [WARMUP_STEPS]. With the defaults the rate is 0.01 for
        10,000 steps and 0.001 at a million.
      timescale: of the factor `rsqrt`, in steps [TIMESCALE].
      cooldown_steps: number of last steps over which the factor `linear_cooldown` falls to 0; 0: no cooldown [COOLDOWN_STEPS].
      policy: see `Policy` [LEARNING_RATE_POLICY].
      restart_warmup_steps: warm-up steps of 'restart', from 0 to the peak [RESTART_WARMUP_STEPS].
      peak_learning_rate: peak of 'restart'; None: the factors' product at warmup_steps, their own peak [PEAK_LEARNING_RATE].
      min_learning_rate: last value of 'restart' and constant of 'minimum'; None: the factors' product at the run's first step
        [MIN_LEARNING_RATE].
    """

    factors: str = 'constant * rsqrt_decay'
    base_learning_rate: Natural = 1.0
    warmup_steps: Whole = 10_000
    timescale: Count = 10_000
    cooldown_steps: Whole = 0
    policy: Policy = Policy.CONTINUE
    restart_warmup_steps: Whole = 0
    peak_learning_rate: Positive | None = None
    min_learning_rate: Natural | None = None

    def __post_init__(self):
        schema.validate(self, {'factors': 'LEARNING_RATE_FACTORS', 'policy': 'LEARNING_RATE_POLICY'})
        known = self._factors(1)
        for name in self.names:
            if name not in known:
                raise UserError(
                    f'LEARNING_RATE_FACTORS has an unknown factor {name!r}: choose from {", ".join(known)}.'
                )
        if self.cooldown_steps and 'linear_cooldown' not in self.names:
            raise UserError(
                f"COOLDOWN_STEPS = {self.cooldown_steps} needs the factor 'linear_cooldown' in LEARNING_RATE_FACTORS = "
                f'{self.factors!r}: add it.'
            )

    @property
    def names(self) -> list[str]:
        """The names of the factors."""
        return [name.strip() for name in self.factors.split('*')]

    @property
    def falls_towards_the_end(self) -> bool:
        """Whether the rate before the last step depends on the number of the last step."""
        if self.policy is not Policy.CONTINUE:
            return self.policy is Policy.RESTART
        return 'cosine_decay' in self.names or self.cooldown_steps > 0

    def ends_in_warmup(self, total_steps: int) -> bool:
        """Whether a run that ends at this step never reaches the peak of a schedule with a linear warm-up."""
        return self.policy is Policy.CONTINUE and 'linear_warmup' in self.names and self.warmup_steps >= total_steps

    @property
    def can_begin_at_0(self) -> bool:
        """Whether a run from a checkpoint of unknown step can count from 0.

        Either the schedule has ended with the dense run, or what the run uses of it does not depend on the first step.
        """
        if self.policy is Policy.CONTINUE:
            return 'cosine_decay' in self.names
        given = self.min_learning_rate is not None
        return given and (self.policy is Policy.MINIMUM or self.peak_learning_rate is not None)

    def schedule(self, start_step: int, total_steps: int) -> Schedule:
        """Builds the schedule of a run.

        Args:
          start_step: first step of the run; 0 from scratch. Unused by the policy 'continue'.
          total_steps: last step of the run, counted like `start_step`.

        Returns:
          A function from step (0 before the first update) to learning rate, float32.

        Raises:
          UserError: the warm-up or the cooldown is longer than the run.
        """
        if self.cooldown_steps > total_steps - start_step:
            raise UserError(
                f'COOLDOWN_STEPS = {self.cooldown_steps} is longer than the run, which goes from step {start_step} to '
                f'TRAIN_STEPS = {total_steps}: lower COOLDOWN_STEPS.'
            )
        factors = self._factors(total_steps)

        def product(step: jax.Array) -> jax.Array:
            step = jnp.asarray(step, jnp.float32)
            rate = jnp.ones((), jnp.float32)
            for name in self.names:
                rate *= factors[name](step)
            return rate

        if self.policy is Policy.CONTINUE:
            return product
        low = product(start_step) if self.min_learning_rate is None else jnp.float32(self.min_learning_rate)
        if self.policy is Policy.MINIMUM:
            return lambda step: low
        warmup = self.restart_warmup_steps
        if warmup >= total_steps - start_step:
            raise UserError(
                f'RESTART_WARMUP_STEPS = {warmup} must be less than the length of the run, which goes from step {start_step} '
                f'to TRAIN_STEPS = {total_steps}.'
            )
        peak = product(self.warmup_steps) if self.peak_learning_rate is None else jnp.float32(self.peak_learning_rate)

        def restart(step: jax.Array) -> jax.Array:
            done = jnp.asarray(step, jnp.float32) - start_step
            rise = jnp.minimum(1.0, done / max(warmup, 1)) if warmup else 1.0
            return rise * (low + (peak - low) * _cosine(done - warmup, total_steps - start_step - warmup))

        return restart

    def _factors(self, total_steps: int) -> dict[str, Schedule]:
        warmup = max(self.warmup_steps, 1)
        decay_steps = max(total_steps - self.warmup_steps, 1)
        cooldown = self.cooldown_steps
        return {
            'constant': lambda step: jnp.asarray(self.base_learning_rate, jnp.float32),
            'linear_warmup': lambda step: jnp.minimum(1.0, step / warmup) if self.warmup_steps else 1.0,
            'rsqrt_decay': lambda step: jax.lax.rsqrt(jnp.maximum(step, warmup)),
            'rsqrt_normalized_decay': lambda step: jnp.sqrt(warmup) * jax.lax.rsqrt(jnp.maximum(step, warmup)),
            'cosine_decay': lambda step: _cosine(step - self.warmup_steps, decay_steps),
            'rsqrt': lambda step: jax.lax.rsqrt(1.0 + jnp.maximum(step - self.warmup_steps, 0.0) / self.timescale),
            'linear_cooldown': lambda step: jnp.clip((total_steps - step) / cooldown, 0.0, 1.0) if cooldown else 1.0,
        }


def _cosine(step: jax.Array, steps: int) -> jax.Array:
    """Falls from 1 at step 0 to 0 at `steps`."""
    return 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(step / steps, 0.0, 1.0)))
