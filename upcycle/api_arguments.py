"""Checks of the arguments of `upcycle.api`."""

import functools
import inspect
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from upcycle import partitioning, trees
from upcycle.errors import UserError, one_line
from upcycle.foreign import State
from upcycle.models import Model
from upcycle.models.base import read_features
from upcycle.surgery.plan import Surgery

PATHS = (str, os.PathLike)


def require(name: str, value: Any, kinds: type | tuple[type, ...], description: str) -> None:
    """Raises UserError unless an argument is of one of these classes."""
    if not isinstance(value, kinds):
        raise UserError(f'{name} must be {description}, not {type(value).__name__}.')


def is_model(value: Any) -> bool:
    """True for a model of this package."""
    return hasattr(value, 'smallest_batch') and not inspect.isclass(value)


def require_model(name: str, value: Any, or_else: str = '') -> None:
    """Raises UserError unless an argument is a model; `or_else` names what else it may be."""
    if not is_model(value):
        raise UserError(
            f'{name} must be a model of this package, such as `upcycle.load` returns{or_else}, not {type(value).__name__}.'
        )


def check_files(name: str, files: Any) -> None:
    """Raises UserError unless an argument is a list or tuple of file names."""
    require(name, files, (list, tuple), "a list of file names, such as ['models/NAME.gin']")
    for file in files:
        require(f'each item of {name}', file, PATHS, 'a file name')


def as_surgery(surgery: Any) -> Surgery:
    """Returns the surgery, or the default one for None; raises UserError for any other object."""
    if surgery is None:
        return Surgery()
    require('surgery', surgery, Surgery, "a Surgery, such as Surgery(operator='copy')")
    return surgery


def check_outside_jit(function: str) -> None:
    """Raises UserError if JAX traces the caller, as within `jax.jit`."""
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise UserError(
            f'{function} reads and places arrays: call {function} outside of jax.jit and other transformations.'
        )


def require_numbers(source: Any) -> None:
    """Raises UserError unless JAX can hold the numbers of all sources in memory; see `trees.require_numbers`."""
    for each in source if isinstance(source, list | tuple) else [source]:
        if is_model(each):
            raise UserError('params is a model without numbers: pass its parameters, or the path of a checkpoint.')
        if isinstance(each, State):
            trees.require_numbers(each.params, 'params')
            trees.require_numbers(each.opt_state, 'opt_state')
        elif not isinstance(each, PATHS):
            trees.require_numbers(each, 'params')


def check_batch(model: Model, leaves: Mapping[str, jax.ShapeDtypeStruct], batch: Any) -> None:
    """Traces the model on a batch.

    Args:
      model: the sparse model.
      leaves: its parameters with their shardings, by their names in a checkpoint.
      batch: the batch.

    Raises:
      UserError: a feature of training is missing or has the wrong shape, or the batch does not divide among the devices.
    """
    require('batch', batch, Mapping, 'a dict of arrays by feature')
    read_features(batch, model.inputs)
    mesh = next(iter(leaves.values())).sharding.mesh
    params = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    forward = functools.partial(model.forward, rng=None, training=False, num_microbatches=1)
    try:
        with partitioning.use(mesh):
            jax.eval_shape(forward, unflatten_dict(params, sep='/')['params'], dict(batch))
    except KeyError as error:
        read_features(batch, error.args)
        raise
    except UserError:
        raise
    except Exception as error:  # whatever JAX raises for arrays of another type or shape
        raise UserError(f'the model cannot read the batch: {one_line(error)}') from error


def check_mesh(mesh: Any) -> None:
    """Raises UserError unless an argument is a mesh or None."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise UserError(f'mesh = {mesh!r} must be a jax.sharding.Mesh, such as one from partitioning.make_mesh.')
