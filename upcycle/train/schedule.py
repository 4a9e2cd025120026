"""Learning-rate schedules. A schedule is a function of the step; it goes on where a dense run stood because the step does."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from upcycle.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]


def create_learning_rate_scheduler(
    factors: str = 'constant * rsqrt_decay', base_learning_rate: float = 1.0, warmup_steps: int = 10_000
) -> Schedule:
    """A product of factors, as T5X's function of the same name.

    Args:
      factors: names joined by '*': `constant` (base_learning_rate), `linear_warmup` (min(1, step / warmup_steps)),
        `rsqrt_decay` (1 / sqrt(max(step, warmup_steps))), `rsqrt_normalized_decay` (the same, 1 at warmup_steps).
      base_learning_rate: of the factor `constant` [BASE_LEARNING_RATE].
      warmup_steps: [WARMUP_STEPS]. With the defaults the rate is 0.01 for 10,000 steps and 0.001 at a million.

    Returns:
      A function from step (0 before the first update) to learning rate, float32.

    Raises:
      UserError: an unknown factor.
    """
    warmup = max(warmup_steps, 1)
    known: dict[str, Schedule] = {
        'constant': lambda step: jnp.asarray(base_learning_rate, jnp.float32),
        'linear_warmup': lambda step: jnp.minimum(1.0, step / warmup),
        'rsqrt_decay': lambda step: jax.lax.rsqrt(jnp.maximum(step, warmup)),
        'rsqrt_normalized_decay': lambda step: jnp.sqrt(warmup) * jax.lax.rsqrt(jnp.maximum(step, warmup)),
    }
    names = [name.strip() for name in factors.split('*')]
    for name in names:
        if name not in known:
            raise UserError(f'LEARNING_RATE_FACTORS names {name!r}, which is not one of {", ".join(known)}.')

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rate = jnp.ones((), jnp.float32)
        for name in names:
            rate *= known[name](step)
        return rate

    return schedule
