"""Optimizers: Adafactor as T5X's, with leading batch axes (an expert's update depends on that expert alone), AdamW and SGD.

The state is a plain tree: `count`, and `param_states`, which mirrors the parameters with T5X's leaf names: of Adafactor `v_row`,
`v_col` (factored), `v` (not factored) and `m` (momentum); leaves that T5X fills with a placeholder of shape (1,) are left out.
Of AdamW `m` and `v`, of SGD `m`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol

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
    """What the training step needs. `batch_axes` has the structure of the parameters and counts the leading axes (experts,
    scanned layers) along which every slice is a parameter of its own."""

    def init(self, params: Params, batch_axes: Params) -> State:
        """State of zeros, with `count` 0."""

    def update(
        self, grads: Params, state: State, params: Params, learning_rate: jax.Array, batch_axes: Params
    ) -> tuple[Params, State]:
        """One step: (new parameters, new state)."""

    def state_specs(self, params: Params, specs: Params, batch_axes: Params) -> State:
        """How the state lies on the mesh, given how the parameters do: a tree of `PartitionSpec`."""


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Shazeer & Stern 2018, as in `t5x/adafactor.py`, whose argument names these are.

    Attributes:
      decay_rate: the second moment decays at 1 - t ** -decay_rate.
      decay_cap: that decay is at most this (Zhai et al. 2022: 0.999); None: 1.
      step_offset: subtracted from the count in that clock.
      clipping_threshold: an update's root mean square is clipped to it; None: not clipped.
      multiply_by_parameter_scale: the step is relative to the parameter's root mean square (at least epsilon2).
      min_dim_size_to_factor: a matrix is factored if both of its largest dimensions reach this.
      expert_min_dim_size_to_factor: the same for leaves with batch axes. None: the same threshold, so that an expert is
        treated as the dense MLP it came from. T5X always factors its experts: 1 matches it in models narrower than 128.
      beta1: momentum; None: none.
      momentum_dtype: in which the momentum is kept.
      weight_decay_rate: decoupled. A number: parameters shrink by this share each step, whatever the learning rate, as in T5X.
        {regular expression: number}: by this share times the learning rate, as in V-MoE; of the expressions that match a
        parameter's path somewhere, the first counts.
      weight_decay_names: regular expression, for a number; the parameters whose path it matches somewhere decay.
      clip_global_norm: gradients are scaled down to this norm over all parameters; None: not.
      epsilon1: added to the squared gradient.
      epsilon2: floor of the parameter scale.
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
        """Zeros of the right shapes; `params` may be abstract under `jax.eval_shape`."""
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
        """One step on every leaf: (new parameters, new state)."""
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
        """Each statistic lies as its parameter does, less the axis it averages over."""
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
        """The share that a step takes off a parameter, or None."""
        rate = self.weight_decay_rate
        if isinstance(rate, Mapping):
            found = next((value for names, value in rate.items() if _matches(names, path)), None)
            return None if found is None else found * learning_rate
        return rate if rate is not None and _matches(self.weight_decay_names, path) else None

    def _factored_axes(self, shape: tuple[int, ...], batched: bool) -> tuple[int, int] | None:
        """The two largest axes (second largest, largest), if both are large enough; T5X's heuristic."""
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
            # The row axis moves down by one once the column axis is gone.
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
        kept = param if shrinks is None else (1.0 - shrinks) * param
        return (kept - step).astype(param.dtype), new_state


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Loshchilov & Hutter 2019, by optax. Element by element, so experts need no special care.

    Attributes:
      beta1: decay of the first moment.
      beta2: decay of the second.
      epsilon: added to the root of the second moment.
      weight_decay_rate: decoupled, times the learning rate.
      weight_decay_names: regular expression; the parameters whose path it matches somewhere decay.
      clip_global_norm: gradients are scaled down to this norm over all parameters; None: not.
    """

    beta1: Rate = 0.9
    beta2: Rate = 0.999
    epsilon: Positive = 1e-8
    weight_decay_rate: Natural = 0.0
    weight_decay_names: str = 'kernel'
    clip_global_norm: Positive | None = None

    def init(self, params: Params, batch_axes: Params) -> State:
        """Zeros."""
        return _zeros(params, ('m', 'v'))

    def update(
        self, grads: Params, state: State, params: Params, learning_rate: jax.Array, batch_axes: Params
    ) -> tuple[Params, State]:
        """One step on every leaf: (new parameters, new state)."""
        grads = clip_by_global_norm(grads, self.clip_global_norm)
        old = optax.ScaleByAdamState(state['count'], _slot(state, 'm'), _slot(state, 'v'))
        steps, new = optax.scale_by_adam(self.beta1, self.beta2, self.epsilon).update(grads, old)
        params = _descend(params, steps, learning_rate, self.weight_decay_rate, self.weight_decay_names)
        return params, _state(new.count, m=new.mu, v=new.nu)

    def state_specs(self, params: Params, specs: Params, batch_axes: Params) -> State:
        """Each moment lies as its parameter does."""
        return _like_params(specs, ('m', 'v'))


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum, by optax.

    Attributes:
      momentum: decay of the trace.
      nesterov: look ahead.
      weight_decay_rate: decoupled, times the learning rate.
      weight_decay_names: regular expression; the parameters whose path it matches somewhere decay.
      clip_global_norm: gradients are scaled down to this norm over all parameters; None: not.
    """

    momentum: Rate = 0.9
    nesterov: bool = False
    weight_decay_rate: Natural = 0.0
    weight_decay_names: str = 'kernel'
    clip_global_norm: Positive | None = None

    def init(self, params: Params, batch_axes: Params) -> State:
        """Zeros."""
        return _zeros(params, ('m',))

    def update(
        self, grads: Params, state: State, params: Params, learning_rate: jax.Array, batch_axes: Params
    ) -> tuple[Params, State]:
        """One step on every leaf: (new parameters, new state)."""
        grads = clip_by_global_norm(grads, self.clip_global_norm)
        trace = optax.trace(self.momentum, self.nesterov)
        steps, new = trace.update(grads, optax.TraceState(_slot(state, 'm')))
        params = _descend(params, steps, learning_rate, self.weight_decay_rate, self.weight_decay_names)
        return params, _state(state['count'] + 1, m=new.trace)

    def state_specs(self, params: Params, specs: Params, batch_axes: Params) -> State:
        """The trace lies as its parameter does."""
        return _like_params(specs, ('m',))


def clip_by_global_norm(grads: Params, limit: float | None) -> Params:
    """Gradients scaled so that their norm over all leaves is at most `limit`."""
    if limit is None:
        return grads
    clipped, _ = optax.clip_by_global_norm(limit).update(grads, optax.EmptyState())
    return clipped


def _matches(names: str, path: tuple[str, ...]) -> bool:
    return re.search(names, '/'.join(path)) is not None


def _descend(params: Params, steps: Params, learning_rate: jax.Array, decay: float, names: str) -> Params:
    flat_steps = flatten_dict(steps)
    new = {}
    for path, param in flatten_dict(params).items():
        step = flat_steps[path]
        if decay and _matches(names, path):
            step = step + decay * param
        new[path] = (param - learning_rate * step).astype(param.dtype)
    return unflatten_dict(new)


def _zeros(params: Params, slots: tuple[str, ...]) -> State:
    flat = flatten_dict(params)
    zeros = {(*path, slot): jnp.zeros(leaf.shape, jnp.float32) for path, leaf in flat.items() for slot in slots}
    return {'count': jnp.zeros((), jnp.int32), 'param_states': unflatten_dict(zeros)}


def _slot(state: State, slot: str) -> Params:
    flat = flatten_dict(state['param_states'])
    return unflatten_dict({path[:-1]: leaf for path, leaf in flat.items() if path[-1] == slot})


def _state(count: jax.Array, **slots: Params) -> State:
    flat = {(*path, name): leaf for name, tree in slots.items() for path, leaf in flatten_dict(tree).items()}
    return {'count': count, 'param_states': unflatten_dict(flat)}


def _like_params(specs: Params, slots: tuple[str, ...]) -> State:
    flat = {(*path, slot): spec for path, spec in flatten_dict(specs).items() for slot in slots}
    return {'count': PartitionSpec(), 'param_states': unflatten_dict(flat)}


def _without(shape: tuple, axis: int) -> tuple:
    return shape[:axis] + shape[axis + 1 :]


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))
