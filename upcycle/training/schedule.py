"""Learning-rate schedules. A schedule is a function of the step; it goes on where a dense run stood because the step does."""

import dataclasses
import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp

from upcycle.errors import UserError, one_of
from upcycle.schema import Natural, Positive, Whole

Schedule = Callable[[jax.Array], jax.Array]


class Policy(enum.StrEnum):
    """What becomes of the dense run's schedule in a run that starts from its checkpoint."""

    CONTINUE = 'continue'  # goes on at the dense run's step: the paper's
    RESTART = 'restart'  # back to a peak by a warm-up, then a cosine: NVIDIA's (arXiv 2410.07524)
    MINIMUM = 'minimum'  # constant, where the dense run ended


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """A learning rate, before it is known where the run starts and ends.

    The schedule is a product of factors. T5X's, under its names: `constant` (base_learning_rate), `linear_warmup`
    (min(1, step / warmup_steps)), `rsqrt_decay` (1 / sqrt(max(step, warmup_steps))), `rsqrt_normalized_decay` (the same, 1
    at warmup_steps), `cosine_decay` (from 1 at warmup_steps to 0 at the last step; T5X's begins again after a cycle).
    big_vision's: `rsqrt` (1 / sqrt(1 + (step - warmup_steps) / timescale), 1 before), `linear_cooldown` (to 0 over the last
    cooldown_steps). In vmoe's copy of the last two `rsqrt` stands still during the cooldown; in big_vision it does not.

    Attributes:
      factors: of the rate, names joined by '*': `constant`, `linear_warmup`, `rsqrt_decay`, `rsqrt_normalized_decay`,
        `cosine_decay`, `rsqrt`, `linear_cooldown` [LEARNING_RATE_FACTORS].
      base_learning_rate: the factor `constant` [BASE_LEARNING_RATE].
      warmup_steps: steps of warm-up, or until a decay begins [WARMUP_STEPS]. With the defaults the rate is 0.01 for
        10,000 steps and 0.001 at a million.
      timescale: of the factor `rsqrt`, in steps [TIMESCALE].
      cooldown_steps: last steps over which the factor `linear_cooldown` falls to 0; 0: none [COOLDOWN_STEPS].
      policy: see `Policy` [LEARNING_RATE_POLICY].
      restart_warmup_steps: steps of 'restart' from 0 to the peak [RESTART_WARMUP_STEPS].
      peak_learning_rate: of 'restart'; None: the factors' product at warmup_steps, their own peak [PEAK_LEARNING_RATE].
      min_learning_rate: where 'restart' ends and 'minimum' stays; None: the factors' product at the step at which the run
        starts [MIN_LEARNING_RATE].
    """

    factors: str = 'constant * rsqrt_decay'
    base_learning_rate: Natural = 1.0
    warmup_steps: int = 10_000
    timescale: int = 10_000
    cooldown_steps: int = 0
    policy: Policy = Policy.CONTINUE
    restart_warmup_steps: Whole = 0
    peak_learning_rate: Positive | None = None
    min_learning_rate: Natural | None = None

    def __post_init__(self):
        object.__setattr__(self, 'policy', one_of(Policy, self.policy, 'LEARNING_RATE_POLICY'))
        known = self._factors(1)
        for name in self.names:
            if name not in known:
                raise UserError(f'LEARNING_RATE_FACTORS names {name!r}, which is not one of {", ".join(known)}.')
        for binding, value in (('COOLDOWN_STEPS', self.cooldown_steps), ('WARMUP_STEPS', self.warmup_steps)):
            if value < 0:
                raise UserError(f'{binding} = {value} must be at least 0.')
        if self.timescale <= 0:
            raise UserError(f'TIMESCALE = {self.timescale} must be above 0.')
        if self.cooldown_steps and 'linear_cooldown' not in self.names:
            raise UserError(
                f"COOLDOWN_STEPS = {self.cooldown_steps} needs the factor 'linear_cooldown' in LEARNING_RATE_FACTORS = "
                f'{self.factors!r}: add it.'
            )

    @property
    def names(self) -> list[str]:
        """The factors' names."""
        return [name.strip() for name in self.factors.split('*')]

    @property
    def falls_towards_the_end(self) -> bool:
        """Whether the rate before the last step depends on which step is the last."""
        if self.policy is not Policy.CONTINUE:
            return self.policy is Policy.RESTART
        return 'cosine_decay' in self.names or self.cooldown_steps > 0

    def schedule(self, start_step: int, total_steps: int) -> Schedule:
        """The schedule of a run.

        Args:
          start_step: at which the run starts; 0 from scratch. Of no importance to 'continue'.
          total_steps: at which it ends, counted as `start_step` is.

        Returns:
          A function from step (0 before the first update) to learning rate, float32.

        Raises:
          UserError: warm-up or cooldown do not fit into the run.
        """
        if self.cooldown_steps > total_steps - start_step:
            raise UserError(
                f'COOLDOWN_STEPS = {self.cooldown_steps} is longer than the run, from step {start_step} to TRAIN_STEPS = '
                f'{total_steps}: lower it.'
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
        if not 0 <= warmup < total_steps - start_step:
            raise UserError(
                f'RESTART_WARMUP_STEPS = {warmup} does not fit into the run, from step {start_step} to TRAIN_STEPS = '
                f'{total_steps}: change it.'
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
    """From 1 at step 0 to 0 at `steps`."""
    return 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(step / steps, 0.0, 1.0)))
