"""Surgery from Python: executes a plan on devices and makes its receipt."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

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


def auto_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh with automatic axis types, which surgery needs."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def as_key(key: Any) -> jax.Array:
    """Converts an integer, a key of `jax.random.key` or a raw key of `jax.random.PRNGKey` to a typed key.

    Raises:
      UserError: `key` is none of these.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return jax.random.key(int(key))
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return key
        if key.dtype == jnp.uint32 and key.ndim == 1:
            return jax.random.wrap_key_data(key)
    raise UserError(f'key = {key!r} must be one key, such as jax.random.key(0), or an integer.')


def seed_of(key: jax.Array) -> int | list[int]:
    """Returns, as JSON, the seed of a key made by `jax.random.key`, or the words of any other key."""
    words = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
    of_last = jax.random.key(words[-1] & 0x7FFFFFFF)
    return words[-1] if of_last.dtype == key.dtype and bool(of_last == key) else words


def check_surgery(surgery: Surgery, *, has_state: bool, has_hidden: bool, way_out: str) -> None:
    """Checks that everything a surgery needs is given.

    Args:
      surgery: the specification.
      has_state: optimizer state is given.
      has_hidden: hidden states can be computed.
      way_out: how to provide hidden states, for the message.

    Raises:
      UserError: something is missing.
    """
    if surgery.made_by is None:
        raise UserError("the surgery has operator=None: choose an operator, such as Surgery(operator='copy').")
    if surgery.optimizer_state is OptimizerState.TILE and not has_state:
        raise UserError(
            "optimizer_state='tile' repeats the dense run's optimizer state, and none is given: use 'fresh', or pass it "
            '(in a `State` with path rules; our models need `upcycle.convert` or `upcycle.train`).'
        )
    if surgery.router_init is RouterInit.HIDDEN and not has_hidden:
        raise UserError(f"router_init='hidden' needs hidden states on data: {way_out}, or use another router_init.")


def carry_out(
    plan: Plan,
    reader: Reader,
    shardings: Mapping[str, jax.sharding.Sharding],
    key: jax.Array,
    *,
    hidden: Hidden | None = None,
    names: Callable[[str], str] = str,
    shown: Plan | None = None,
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Executes a plan.

    Args:
      plan: the plan.
      reader: reader of the sources.
      shardings: sharding of each target leaf.
      key: random key, used instead of the surgery's seed.
      hidden: see `surgery.place.execute`.
      names: maps a leaf or MLP of the plan to the user's name, for hashes, lineages and messages.
      shown: the plan with the user's names, for the receipt; None: `plan`.

    Returns:
      The target leaves, and the receipt with the function check pending.

    Raises:
      UserError: a source contains NaN or infinity.
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
    lineages = {names(mlp): lineage for mlp, lineage in lineages.items()}
    source = source_of(reader, reader.step)
    receipt = make_receipt(plan if shown is None else shown, source=source, hashes=hashes, lineages=lineages)
    return leaves, receipt | {'seed': seed_of(key)}
