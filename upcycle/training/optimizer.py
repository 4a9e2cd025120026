"""Optimizers: T5X's Adafactor with leading batch axes (an expert's update depends only on that expert), AdamW and SGD.

The state is a plain tree of `count` and `param_states`, which mirrors the parameters and uses T5X's leaf names. Adafactor has
`v_row` and `v_col` (factored), `v` (not factored) and `m` (momentum), without T5X's placeholder leaves of shape (1,). AdamW has
`m` and `v`, SGD has `m`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from upcycle.schema import Count, Natural, Positive, Rate, Share

Params = Mapping[str, Any]
State = dict[str, Any]


class Optimizer(Protocol):
    """The interface of optimizers. `batch_axes` mirrors the parameters and gives the number of leading axes (experts, scanned
    layers) whose slices are separate parameters."""

    def init(self, params: Params, batch_axes: Params) -> State:
        """Returns a state of zeros; `params` may be abstract under `jax.eval_shape`."""

    def update(
        self, grads: Params, state: State, params: Params, learning_rate: jax.Array, batch_axes: Params
    ) -> tuple[Params, State]:
        """Returns the new parameters and the new state."""

    def state_specs(self, params: Params, specs: Params, batch_axes: Params) -> State:
        """Returns the `PartitionSpec` of every leaf of the state, given those of the parameters."""


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer & Stern 2018), with the arguments of `t5x/adafactor.py`.

    Attributes:
      decay_rate: the second moment decays at 1 - t ** -decay_rate.
      decay_cap: upper limit of that decay (Zhai et al. 2022: 0.999); None: 1.
      step_offset: subtracted from the count t.
      clipping_threshold: limit of an update's root mean square; None: no clipping.
      multiply_by_parameter_scale: multiply the step by the parameter's root mean square (at least epsilon2).
      min_dim_size_to_factor: a matrix is factored if its two largest dimensions are at least this.
      expert_min_dim_size_to_factor: the same for leaves with batch axes. None: the same threshold, so that an expert is
        treated like the dense MLP it came from. T5X always factors its experts: 1 matches it in models narrower than 128.
      beta1: momentum; None: no momentum.
      momentum_dtype: dtype in which the momentum is stored.
      weight_decay_rate: decoupled. A number: parameters shrink by this share each step, whatever the learning rate, as in T5X.
        {regular expression: number}: they shrink by this share times the learning rate, as in V-MoE; the first expression
        found in a parameter's path counts.
      weight_decay_names: regular expression; if weight_decay_rate is a number, it applies to the parameters whose path contains
        a match.
      clip_global_norm: limit of the gradient's norm over all parameters; None: no clipping.
      epsilon1: added to the squared gradient.
      epsilon2: lower limit of the parameter scale.
    """

    decay_rate: Positive = 0.8
    decay_cap: Share | None = None
    step_offset: int = 0
    clipping_threshold: Positive | None = 1.0
    multiply_by_parameter_scale: bool = True
    min_dim_size_to_factor: Count = 128
    expert_min_dim_size_to_factor: Count | None = None
    beta1: Rate | None = None
    momentum_dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'
    weight_decay_rate: Natural | Mapping[str, Natural] | None = None
    weight_decay_names: str = ''
    clip_global_norm: Positive | None = None
    epsilon1: Positive = 1e-30
    epsilon2: Positive = 1e-3

    def init(self, params: Params, batch_axes: Params) -> State:
        """See `Optimizer`."""
        axes = flatten_dict(batch_axes)
        states = {}
        for path, param in flatten_dict(params).items():
            batch, shape = param.shape[: axes[path]], param.shape[axes[path] :]
            for name, leaf_shape in self._state_shapes(shape, batched=bool(batch)).items():
                dtype = self.momentum_dtype if name == 'm' else jnp.float32
                states[(*path, name)] = jnp.zeros(batch + leaf_shape, dtype)
        return {'count': jnp.zeros((), jnp.int32), 'param_states': unflatten_dict(states)}

    def update(
        self, grads: Params, state: State, params: Params, learning_rate: jax.Array, batch_axes: Params
    ) -> tuple[Params, State]:
        """See `Optimizer`."""
        decay = 1.0 - (state['count'] - self.step_offset + 1.0) ** -self.decay_rate
        if self.decay_cap is not None:
            decay = jnp.minimum(decay, self.decay_cap)
        grads = clip_by_global_norm(grads, self.clip_global_norm)
        axes, grads, states = flatten_dict(batch_axes), flatten_dict(grads), flatten_dict(state['param_states'])
        new_params, new_states = {}, {}
        for path, param in flatten_dict(params).items():
            batched = axes[path] > 0
            names = self._state_shapes(param.shape[axes[path] :], batched)
            shrinks = self._shrinkage(path, learning_rate)

            def update_leaf(grad, leaf_state, param, batched=batched, shrinks=shrinks):
                return self._update_leaf(grad, leaf_state, param, learning_rate, decay, batched, shrinks)

            for _ in range(axes[path]):
                update_leaf = jax.vmap(update_leaf)
            leaf_state = {name: states[(*path, name)] for name in names}
            new_params[path], leaf_state = update_leaf(grads[path], leaf_state, param)
            new_states |= {(*path, name): leaf for name, leaf in leaf_state.items()}
        return unflatten_dict(new_params), {'count': state['count'] + 1, 'param_states': unflatten_dict(new_states)}

    def state_specs(self, params: Params, specs: Params, batch_axes: Params) -> State:
        """See `Optimizer`. Each statistic has its parameter's spec without the axis that it averages over."""
        axes, flat_specs = flatten_dict(batch_axes), flatten_dict(specs)
        out = {}
        for path, param in flatten_dict(params).items():
            batch = axes[path]
            spec = tuple(flat_specs[path]) + (None,) * (len(param.shape) - len(flat_specs[path]))
            by_name = {'v': spec, 'm': spec}
            if factored := self._factored_axes(param.shape[batch:], bool(batch)):
                row, column = factored
                by_name |= {'v_row': _without(spec, batch + column), 'v_col': _without(spec, batch + row)}
            for name in self._state_shapes(param.shape[batch:], bool(batch)):
                out[(*path, name)] = PartitionSpec(*by_name[name])
        return {'count': PartitionSpec(), 'param_states': unflatten_dict(out)}

    def _shrinkage(self, path: tuple[str, ...], learning_rate: jax.Array) -> jax.Array | float | None:
        """Returns the share by which a step shrinks a parameter, or None."""
        rate = self.weight_decay_rate
        if isinstance(rate, Mapping):
            share = next((value for names, value in rate.items() if _matches(names, path)), None)
            return None if share is None else share * learning_rate
        return rate if rate is not None and _matches(self.weight_decay_names, path) else None

    def _factored_axes(self, shape: tuple[int, ...], batched: bool) -> tuple[int, int] | None:
        """Returns the axes (second largest, largest) if both are large enough, by T5X's heuristic."""
        threshold = self.min_dim_size_to_factor
        if batched and self.expert_min_dim_size_to_factor is not None:
            threshold = self.expert_min_dim_size_to_factor
        order = np.argsort(shape)
        if len(shape) < 2 or shape[order[-2]] < threshold:
            return None
        return int(order[-2]), int(order[-1])

    def _state_shapes(self, shape: tuple[int, ...], batched: bool) -> dict[str, tuple[int, ...]]:
        axes = self._factored_axes(shape, batched)
        if axes is None:
            shapes = {'v': shape}
        else:
            row, column = axes
            shapes = {'v_row': _without(shape, column), 'v_col': _without(shape, row)}
        return shapes if self.beta1 is None else {**shapes, 'm': shape}

    def _update_leaf(
        self,
        grad: jax.Array,
        state: State,
        param: jax.Array,
        learning_rate: jax.Array,
        decay: jax.Array,
        batched: bool,
        shrinks: jax.Array | float | None,
    ) -> tuple[jax.Array, State]:
        grad = grad.astype(jnp.float32)
        new_state = {}
        squared = jnp.square(grad) + self.epsilon1
        axes = self._factored_axes(param.shape, batched)
        if axes is None:
            new_state['v'] = decay * state['v'] + (1.0 - decay) * squared
            step = grad * new_state['v'] ** -0.5
        else:
            row, column = axes
            v_row = decay * state['v_row'] + (1.0 - decay) * jnp.mean(squared, axis=column)
            v_col = decay * state['v_col'] + (1.0 - decay) * jnp.mean(squared, axis=row)
            new_state |= {'v_row': v_row, 'v_col': v_col}
            # Without the column axis, a row axis behind it moves down by one.
            mean = jnp.mean(v_row, axis=row - (row > column), keepdims=True)
            step = grad * jnp.expand_dims((v_row / mean) ** -0.5, column) * jnp.expand_dims(v_col**-0.5, row)
        if self.clipping_threshold is not None:
            step /= jnp.maximum(1.0, _rms(step) / self.clipping_threshold)
        scale = learning_rate
        if self.multiply_by_parameter_scale:
            scale *= jnp.maximum(_rms(param), self.epsilon2)
        step *= scale
        if self.beta1 is not None:
            step = self.beta1 * state['m'].astype(jnp.float32) + (1.0 - self.beta1) * step
            new_state['m'] = step.astype(self.momentum_dtype)
        decayed = param if shrinks is None else (1.0 - shrinks) * param
        return (decayed - step).astype(param.dtype), new_state


@dataclasses.dataclass(frozen=True)
class _Elementwise:
    """Base class of optax optimizers that update each element alone, so that experts need no special treatment.

    Attributes:
      weight_decay_rate: decoupled, times the learning rate.
      weight_decay_names: regular expression; parameters whose path contains a match decay.
      clip_global_norm: limit of the gradient's norm over all parameters; None: no clipping.
    """

    weight_decay_rate: Natural = 0.0
    weight_decay_names: str = 'kernel'
    clip_global_norm: Positive | None = None

    _SLOTS: ClassVar[tuple[str, ...]]

    def _step(self, grads: Params, count: jax.Array, *slots: Params) -> tuple[Params, tuple[Params, ...]]:
        """Returns the direction of the step and the new slots."""
        raise NotImplementedError

    def init(self, params: Params, batch_axes: Params) -> State:
        """See `Optimizer`."""
        zeros = jax.tree.map(lambda leaf: {slot: jnp.zeros(leaf.shape, jnp.float32) for slot in self._SLOTS}, params)
        return {'count': jnp.zeros((), jnp.int32), 'param_states': zeros}

    def update(
        self, grads: Params, state: State, params: Params, learning_rate: jax.Array, batch_axes: Params
    ) -> tuple[Params, State]:
        """See `Optimizer`."""
        grads = clip_by_global_norm(grads, self.clip_global_norm)
        old = (
            jax.tree.map(lambda _, leaf, slot=slot: leaf[slot], params, state['param_states']) for slot in self._SLOTS
        )
        steps, new = self._step(grads, state['count'], *old)
        flat_steps, new_params = flatten_dict(steps), {}
        for path, param in flatten_dict(params).items():
            step = flat_steps[path]
            if self.weight_decay_rate and _matches(self.weight_decay_names, path):
                step += self.weight_decay_rate * param
            new_params[path] = (param - learning_rate * step).astype(param.dtype)
        slots = jax.tree.map(lambda *leaves: dict(zip(self._SLOTS, leaves, strict=True)), *new)
        return unflatten_dict(new_params), {'count': state['count'] + 1, 'param_states': slots}

    def state_specs(self, params: Params, specs: Params, batch_axes: Params) -> State:
        """See `Optimizer`. Each slot has its parameter's spec."""
        slots = jax.tree.map(lambda _, spec: dict.fromkeys(self._SLOTS, spec), params, specs)
        return {'count': PartitionSpec(), 'param_states': slots}


@dataclasses.dataclass(frozen=True)
class AdamW(_Elementwise):
    """AdamW (Loshchilov & Hutter 2019), by optax.

    Attributes:
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      epsilon: added to the root of the second moment.
    """

    beta1: Rate = 0.9
    beta2: Rate = 0.999
    epsilon: Positive = 1e-8

    _SLOTS = ('m', 'v')

    def _step(self, grads: Params, count: jax.Array, m: Params, v: Params) -> tuple[Params, tuple[Params, ...]]:
        adam = optax.scale_by_adam(self.beta1, self.beta2, self.epsilon)
        steps, new = adam.update(grads, optax.ScaleByAdamState(count, m, v))
        return steps, (new.mu, new.nu)


@dataclasses.dataclass(frozen=True)
class Sgd(_Elementwise):
    """Stochastic gradient descent with momentum, by optax.

    Attributes:
      momentum: decay of the trace.
      nesterov: use Nesterov's momentum.
    """

    momentum: Rate = 0.9
    nesterov: bool = False

    _SLOTS = ('m',)

    def _step(self, grads: Params, count: jax.Array, m: Params) -> tuple[Params, tuple[Params, ...]]:
        steps, new = optax.trace(self.momentum, self.nesterov).update(grads, optax.TraceState(m))
        return steps, (new.trace,)


def clip_by_global_norm(grads: Params, limit: float | None) -> Params:
    """Scales gradients so that their norm over all leaves is at most `limit`."""
    if limit is None:
        return grads
    clipped, _ = optax.clip_by_global_norm(limit).update(grads, optax.EmptyState())
    return clipped


def _matches(names: str, path: tuple[str, ...]) -> bool:
    return re.search(names, '/'.join(path)) is not None


def _without(shape: tuple, axis: int) -> tuple:
    return shape[:axis] + shape[axis + 1 :]


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))
