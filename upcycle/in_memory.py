"""Surgery from Python: executes a plan on devices and makes its receipt."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from upcycle import partitioning
from upcycle.checkpoints import Reader
from upcycle.checkpoints.arrays import count_not_finite, require_finite
from upcycle.checkpoints.memory import MemoryReader
from upcycle.collected_layer import CHECKED_BYTES, CHECKED_TOKENS
from upcycle.cost import num_bytes
from upcycle.errors import UserError
from upcycle.models import Model
from upcycle.surgery.fingerprint import sha256_of
from upcycle.surgery.operators import Lineage, Start
from upcycle.surgery.place import execute
from upcycle.surgery.plan import PARAMS, Action, OptimizerState, Plan, Surgery, mlp_of, within_mlp
from upcycle.surgery.receipt import check_layer, make_receipt
from upcycle.surgery.router_init import RouterInit
from upcycle.training.receipt_of_start import source_of
from upcycle.warning import warn

# JAX keeps 32 bits of a seed.
_LARGEST_SEED = 2**32 - 1
Hidden = Callable[[Mapping[str, jax.Array], str], np.ndarray]


def auto_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh with automatic axis types, which surgery needs."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def as_key(key: Any) -> jax.Array:
    """Converts an integer, a key of `jax.random.key` or a raw key of `jax.random.PRNGKey` to a typed key.

    Raises:
      UserError: `key` is none of these, or an integer that would give the key of another integer.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not 0 <= key <= _LARGEST_SEED:
            raise UserError(
                f'key = {int(key)} must be between 0 and {_LARGEST_SEED}, or a key, such as jax.random.key(0).'
            )
        return jax.random.key(int(key))
    if isinstance(key, jax.Array | np.ndarray) and not isinstance(key, jax.core.Tracer):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return key
        with contextlib.suppress(TypeError):  # not the number of words of JAX's default generator
            if key.dtype == jnp.uint32 and key.ndim == 1:
                return jax.random.wrap_key_data(key)
    raise UserError(f'key = {key!r} must be one key, such as jax.random.key(0), or an integer.')


def check_experts(mesh: Mesh, num_experts: Iterable[int]) -> None:
    """Checks that a mesh can shard experts.

    Args:
      mesh: mesh of the result. Without an axis `expert`, devices hold all experts, which a warning says.
      num_experts: number of experts of each layer.

    Raises:
      UserError: experts do not divide among the shards of the axis `expert`.
    """
    num_experts = sorted({*num_experts})
    if num_experts and mesh.size > 1 and 'expert' not in mesh.shape:
        warn(f'mesh has the axes {", ".join(mesh.axis_names)} and none named `expert`: each device holds all experts.')
    shards = mesh.shape.get('expert', 1)
    if uneven := [count for count in num_experts if count % shards]:
        raise UserError(
            f'{uneven[0]} experts do not divide among the {shards} shards of the axis `expert` of mesh: change one of them.'
        )


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
    if surgery.router_prompts:
        raise UserError(
            'router_prompts needs the tokenizer of a checkpoint: use `upcycle.convert` or `upcycle.train` with ROUTER_PROMPTS.'
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
            if reader.format != MemoryReader.format:
                require_finite(str(reader.path), name, host)
            elif count := count_not_finite(host):
                raise UserError(f'{name} holds {count} numbers that are NaN or infinite: fix them before the call.')
            hashes[name] = sha256_of(name, host)

    plan, shown = (_with_known_types(each) for each in (plan, plan if shown is None else shown))
    leaves = execute(plan, reader.read, shardings, new={}, on_source=look, hidden=hidden, lineages=lineages, key=key)
    lineages = {names(mlp): lineage for mlp, lineage in lineages.items()}
    source = source_of(reader, reader.step)
    receipt = make_receipt(shown, source=source, hashes=hashes, lineages=lineages)
    return leaves, receipt | {'seed': seed_of(key)}


def check_layers(
    plan: Plan, model: Model, reader: Reader, flat: Mapping[str, jax.Array]
) -> dict[str, dict[str, float]]:
    """Compares each MoE layer with its dense MLP, as `upcycle convert` does."""
    if plan.spec.operator is None or plan.spec.operator.starts_from is not Start.DENSE:
        return {}
    checks = {}
    for path in model.moe_layers():
        mlp = f'{PARAMS}{path}'
        inside = {name.removeprefix(f'{mlp}/'): leaf for name, leaf in flat.items() if name.startswith(f'{mlp}/')}
        rows = [row for row in plan.rows if row.action is Action.EXPERTS and mlp_of(row.target) == mlp and row.sources]
        routed = any(name.startswith('router/') for name in inside)
        if rows and routed and num_bytes(inside) <= CHECKED_BYTES:
            host = partitioning.whole_on_host
            dense = {within_mlp(row.target): host(reader.read(row.sources[0])) for row in rows}
            inside = {name: host(leaf) for name, leaf in inside.items()}
            # Outside the mesh, whose devices may be more than the routing groups of the checked tokens.
            with partitioning.on_one_device(jax.local_devices()[0]):
                checks[path] = dataclasses.asdict(check_layer(model, path, dense, inside, CHECKED_TOKENS))
    return checks


def _with_known_types(plan: Plan) -> Plan:
    """Replaces 64-bit types by those that JAX uses for them."""
    rows = (dataclasses.replace(row, dtype=jax.dtypes.canonicalize_dtype(row.dtype)) for row in plan.rows)
    return dataclasses.replace(plan, rows=tuple(rows))
