"""Caches of traced and compiled programs, shared by all tests of a process that use the same model."""

import dataclasses
import functools
import gc
import pathlib
import resource
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from upcycle import streamed
from upcycle.evaluate import diversity, few_shot, token_statistics, validation
from upcycle.surgery import receipt
from upcycle.training import loop
from upcycle.training import state as states

# Programs of each kind; a compiled training step of a tiny model takes 30 MB.
KEPT = 12


def share() -> None:
    """From now on, runs share compiled programs if everything that the program depends on is equal."""
    collect()
    gc.set_threshold(20_000, 20, 20)
    for module in (validation, few_shot, token_statistics):
        module.compiled = functools.lru_cache(maxsize=KEPT)(module.compiled)
    diversity.compiled = _shared(diversity.compiled, lambda layers: repr(layers))
    streamed.cut_into_pieces = functools.lru_cache(maxsize=KEPT)(streamed.cut_into_pieces)
    receipt.function_checks = functools.lru_cache(maxsize=KEPT)(receipt.function_checks)
    states.initializer = _shared(states.initializer, lambda run, where: (_shapes(run, where), _rest(run)))
    loop.lower_step = _shared(_lower_step(loop.lower_step), _step)


def collect() -> None:
    """Frees reference cycles, and excludes the rest (libraries, programs) from later collections, which would take long."""
    gc.collect()
    gc.freeze()


def trim(limit: int) -> None:
    """Clears JAX's caches if this process holds more than `limit` bytes of memory; on Linux only."""
    statm = pathlib.Path('/proc/self/statm')
    if statm.exists() and int(statm.read_text().split()[1]) * resource.getpagesize() > limit:
        jax.clear_caches()
        gc.unfreeze()
        collect()


def _shared(make: Callable[..., Any], key: Callable[..., Hashable]) -> Callable[..., Any]:
    """Wraps `make` with a cache of its newest `KEPT` results, by key."""
    kept: dict[Hashable, Any] = {}

    @functools.wraps(make)
    def shared(*arguments: Any) -> Any:
        which = key(*arguments)
        if which not in kept:
            if len(kept) == KEPT:
                del kept[next(iter(kept))]
            kept[which] = make(*arguments)
        return kept[which]

    return shared


# Fields of a run that no program depends on, and those that the keys below contain in another form.
_WITHOUT = {
    *('model_dir', 'initial_checkpoint_path', 'surgery', 'dense_step', 'dense_flops', 'step_0_factors', 'few_shot'),
    *(
        'task_metrics',
        'diversity_period',
        'eval_data',
        'eval_period',
        'checkpoint_period',
        'checkpoint_keep',
        'log_period',
    ),
    *('limits', 'seed'),
    *('model', 'train_data', 'learning_rate', 'total_steps', 'trainable'),
}


def _rest(run: Any) -> Hashable:
    """All other fields of a run, including future ones."""
    return tuple((f.name, repr(getattr(run, f.name))) for f in dataclasses.fields(run) if f.name not in _WITHOUT)


def _shapes(run: Any, where: states.Layout) -> Hashable:
    leaves = tuple((name, leaf.shape, str(leaf.dtype), leaf.sharding) for name, leaf in where.flat().items())
    return run.model, tuple(sorted(run.train_data.batch_spec().items())), leaves


def _step(run: Any, where: states.Layout, batch_sharding: jax.sharding.Sharding, start_step: int = 0) -> Hashable:
    """Everything that `loop.lower_step` depends on. The run's length matters only through its schedule."""
    schedule = run.learning_rate.schedule(start_step, run.total_steps)
    rate = str(jax.make_jaxpr(schedule)(jax.ShapeDtypeStruct((), jnp.int32)))
    frozen = run.trainable.frozen(where.abstract.params, run.model.moe_layers(), start_step)
    return _shapes(run, where), _rest(run), rate, frozen, batch_sharding


def _lower_step(lower: Callable[..., jax.stages.Lowered]) -> Callable[..., '_Lowered']:
    return lambda *arguments: _Lowered(lower(*arguments))


class _Lowered:
    """A lowered program that is compiled once per set of options."""

    def __init__(self, lowered: jax.stages.Lowered):
        self._lowered, self._compiled = lowered, {}

    def compile(self, compiler_options: dict[str, Any] | None = None) -> jax.stages.Compiled:
        which = repr(compiler_options)
        if which not in self._compiled:
            self._compiled[which] = self._lowered.compile(compiler_options)
        return self._compiled[which]
