"""Surgery from Python: a plan carried out onto devices, with its receipt."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upcycle import partitioning
from upcycle.checkpoints import Reader
from upcycle.checkpoints.arrays import require_finite
from upcycle.errors import UserError
from upcycle.surgery.fingerprint import sha256_of
from upcycle.surgery.operators import Lineage
from upcycle.surgery.place import execute
from upcycle.surgery.plan import OptimizerState, Plan, Surgery
from upcycle.surgery.receipt import make_receipt
from upcycle.surgery.router_init import RouterInit
from upcycle.training.receipt_of_start import source_of

Hidden = Callable[[Mapping[str, jax.Array], str], np.ndarray]


def as_key(key: Any) -> jax.Array:
    """A random key of a whole number, a key of `jax.random.key`, or a raw one of `jax.random.PRNGKey`.

    Raises:
      UserError: it is none of them.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return jax.random.key(int(key))
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return key
        if key.dtype == jnp.uint32 and key.ndim == 1:
            return jax.random.wrap_key_data(key)
    raise UserError(f'key = {key!r} must be one key, such as jax.random.key(0), or a whole number.')


def seed_of(key: jax.Array) -> int | list[int]:
    """The seed that a key was made of by `jax.random.key`, or else the words of the key, as JSON."""
    words = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
    of_last = jax.random.key(words[-1] & 0x7FFFFFFF)
    return words[-1] if of_last.dtype == key.dtype and bool(of_last == key) else words


def check_surgery(surgery: Surgery, *, has_state: bool, has_hidden: bool, way_out: str) -> None:
    """What a surgery needs and is not given.

    Args:
      surgery: to be carried out.
      has_state: the optimizer's state is given.
      has_hidden: hidden states can be computed.
      way_out: how to give hidden states, for the message.

    Raises:
      UserError: something is missing.
    """
    if surgery.made_by is None:
        raise UserError(
            "the surgery has operator=None: name how the experts are made, such as Surgery(operator='copy')."
        )
    if surgery.optimizer_state is OptimizerState.TILE and not has_state:
        raise UserError(
            "optimizer_state='tile' repeats the dense run's optimizer state, and none is given: use 'fresh', or give it "
            '(`State` for a model with path rules; `upcycle.convert` or `upcycle.train` for ours).'
        )
    if surgery.router_init is RouterInit.HIDDEN and not has_hidden:
        raise UserError(f"router_init='hidden' needs hidden states on data: {way_out}, or use another one.")


@dataclasses.dataclass(frozen=True)
class Made:
    """What a surgery made.

    Attributes:
      leaves: of the target.
      hashes: sha256 of each leaf that was read.
      lineages: of each MLP, what its experts were made of.
    """

    leaves: dict[str, jax.Array]
    hashes: dict[str, str]
    lineages: dict[str, Lineage]


def carry_out(
    plan: Plan,
    reader: Reader,
    shardings: Mapping[str, jax.sharding.Sharding],
    key: jax.Array,
    *,
    hidden: Hidden | None = None,
    names: Callable[[str], str] = str,
) -> Made:
    """Makes the leaves of a plan.

    Args:
      plan: what to make from what.
      reader: of the sources.
      shardings: of each target leaf.
      key: of everything random, in place of the seed of the surgery.
      hidden: see `surgery.place.execute`.
      names: what the user calls a leaf or an MLP of the plan, for hashes, lineages and messages.

    Raises:
      UserError: a source holds NaN or infinity.
    """
    hashes: dict[str, str] = {}
    lineages: dict[str, Lineage] = {}

    def look(name: str, leaf: jax.Array | np.ndarray) -> None:
        name = names(name)
        if name not in hashes:
            host = partitioning.whole_on_host(leaf)
            require_finite(str(reader.path), name, host)
            hashes[name] = sha256_of(name, host)

    leaves = execute(plan, reader.read, shardings, new={}, on_source=look, hidden=hidden, lineages=lineages, key=key)
    return Made(leaves, hashes, {names(mlp): lineage for mlp, lineage in lineages.items()})


def receipt_of(plan: Plan, reader: Reader, key: jax.Array, made: Made) -> dict[str, Any]:
    """The receipt of what `carry_out` made, before the function check."""
    receipt = make_receipt(plan, source=source_of(reader, reader.step), hashes=made.hashes, lineages=made.lineages)
    return receipt | {'seed': seed_of(key)}
