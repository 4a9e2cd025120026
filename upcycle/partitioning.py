"""The device mesh, and the mapping of logical axes to mesh axes.

Mesh axes: `data` and `expert` split the batch, `expert` the experts, `model` the width of MLPs, attention and vocabulary.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from upcycle import platforms
from upcycle.data import WHOLE, DataSource, Share
from upcycle.data.kept import Kept
from upcycle.errors import UserError
from upcycle.schema import shown

MESH_AXES = ('data', 'expert', 'model')
BATCH_AXES = ('data', 'expert')

BATCH_AXES = ('data', 'expert')

# T5X's logical axis names. Axes that are not listed are never split.
RULES: tuple[tuple[str, Any], ...] = (
    ('batch', BATCH_AXES),
    ('expert', 'expert'),
    ('vocab', 'model'),
    ('mlp', 'model'),
    ('expert_mlp', 'model'),
    ('joined_kv', 'model'),
    ('kv_heads', 'model'),
    ('heads', 'model'),
)

# Fully sharded data parallelism: parameters are also split over `data`, along an axis that the rules above do not split; and over
# `expert`, if they are not of experts and divide.
EXPERTS_OVER_DATA = ('mlp_embed', 'data')
OVER_DATA: tuple[tuple[str, Any], ...] = (('embed', ('data', 'expert')), EXPERTS_OVER_DATA)

# Axes along which a leaf is a stack of parameters with separate optimizer states.
STACKED_AXES = ('expert', 'layers')


def make_mesh(shape: Sequence[int] | str, num_experts: int | None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the device mesh.

    Args:
      shape: (data, expert, model) [MESH_SHAPE], or 'auto': the most expert shards that divide both the devices of a slice and the
        experts, the rest data.
      num_experts: E, or None for a dense model.
      devices: to use; None for all.

    Raises:
      UserError: the shape does not match the devices, or the experts do not divide.
    """
    devices = platforms.devices() if devices is None else devices
    count = len(devices)
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if shape == 'auto':
        expert = math.gcd(count // slices, num_experts) if num_experts else 1
        shape = (count // expert, expert, 1)
    if isinstance(shape, str) or len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise UserError(f"MESH_SHAPE = {shown(shape)} must be 'auto' or three sizes (data, expert, model).")
    shape = tuple(shape)
    if math.prod(shape) != count:
        raise UserError(f'MESH_SHAPE = {shape!r} needs {math.prod(shape)} devices, but there are {count}.')
    if num_experts and num_experts % shape[1]:
        raise UserError(
            f'NUM_EXPERTS = {num_experts} does not divide among the {shape[1]} shards of the expert axis of '
            f'MESH_SHAPE = {shape!r}: change one of them.'
        )
    if shape[0] % slices:
        raise UserError(
            f'MESH_SHAPE = {shape!r}: only the data axis may cross slices, so its size must be a multiple of their number, '
            f'{slices}.'
        )
    # A pod's torus, such as 4 x 4 x 4, has no axes of 2 and 32, so one is split.
    if slices == 1:
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        inside, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
        laid_out = mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
    return Mesh(laid_out, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


# Of the mesh in use: abstract meshes, which are all that programs see while they are traced, do not have devices.
_DEVICE: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar('device', default=None)


@contextlib.contextmanager
def _on(device: jax.Device) -> Iterator[None]:
    token = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(token)


@contextlib.contextmanager
def use(mesh: Mesh, *, over_data: bool = False) -> Iterator[None]:
    """Context in which logical constraints on activations refer to this mesh.

    Args:
      mesh: to use.
      over_data: whether parameters are split over `data`, for layers that gather theirs themselves.
    """
    rules = RULES + (EXPERTS_OVER_DATA,) if over_data else RULES
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules), _on(mesh.devices.flat[0]):
        yield


def device() -> jax.Device:
    """Returns a device of the mesh in use, or without one that of new arrays: the kind that a program is traced for."""
    default = jax.config.jax_default_device
    if isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    return _DEVICE.get() or default or jax.local_devices()[0]


def experts_are_over_data() -> bool:
    """Whether the parameters of experts are split over `data` in the enclosing `use`."""
    return EXPERTS_OVER_DATA in nn.get_logical_axis_rules()


@contextlib.contextmanager
def on_one_device(device: jax.Device) -> Iterator[None]:
    """Context in which results computed from host arrays, eagerly or by `jax.jit`, lie on one device, also within `use`.

    A mesh in use places such arrays on all of its devices, including other processes', regardless of the default device.
    """
    with jax.set_mesh(None), jax.default_device(device), _on(device):
        yield


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh of the enclosing `use`; None outside of one, and for a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def batch_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Returns the number of parts into which a mesh splits a batch."""
    return 1 if mesh is None else mesh.shape['data'] * mesh.shape['expert']


def head_axis(mesh: Mesh | AbstractMesh, heads: int) -> str | None:
    """Returns the mesh axis that splits attention heads; None if it does not divide them."""
    return 'model' if heads % mesh.shape['model'] == 0 else None


def unbox(boxed: Any) -> Any:
    """Removes the boxes of parameters without moving them (`flax.linen.unbox` would also lay them out on the mesh in use)."""
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)


def logical_axes(boxed: Any) -> Any:
    """Returns the logical axes of each parameter, as a `PartitionSpec` of names."""
    return nn.get_partition_spec(boxed)


def batch_axes(boxed: Any) -> Any:
    """Counts for each parameter the leading axes that are stacks of parameters."""
    return jax.tree.map(lambda spec: sum(name in STACKED_AXES for name in spec), logical_axes(boxed))


def mesh_axes(
    logical: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, *, over_data: bool = False
) -> PartitionSpec:
    """Returns the mesh axes of a parameter.

    Of the mesh axes of a rule those count that the mesh has and that split no earlier axis. All of them split an axis that they
    divide evenly, otherwise the first if that does.
    """
    rules = dict(RULES + (OVER_DATA if over_data else ()))
    spec: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, size in zip(logical, shape, strict=True):
        rule = rules.get(name)
        axes = [
            axis
            for axis in ((rule,) if isinstance(rule, str) else rule or ())
            if axis in mesh.shape and axis not in used
        ]
        for chosen in (axes, axes[:1]):
            if chosen and size % math.prod(mesh.shape[axis] for axis in chosen) == 0:
                used.update(chosen)
                spec.append(chosen[0] if len(chosen) == 1 else tuple(chosen))
                break
        else:
            spec.append(None)
    return PartitionSpec(*spec)


def param_specs(boxed: Any, mesh: Mesh, *, over_data: bool = False) -> Any:
    """Returns the `PartitionSpec` of each parameter by its logical axes; with `over_data` also split over the data axis."""
    return jax.tree.map(
        lambda logical, param: mesh_axes(logical, param.shape, mesh, over_data=over_data),
        logical_axes(boxed),
        unbox(boxed),
    )


def constrain_stack(stack: jax.Array, logical: PartitionSpec) -> jax.Array:
    """Shards a stack of parameters along the axes of the mesh in use that split one of them.

    The compiler chooses the sharding of other axes, along which parameters may be split over `data`.

    Args:
      stack: (layers, *shape of the parameter).
      logical: the parameter's logical axes.
    """
    mesh = current_mesh()
    if mesh is None:
        return stack
    free = PartitionSpec.UNCONSTRAINED
    spec = [axis or free for axis in mesh_axes(logical, stack.shape[1:], mesh)]
    return jax.lax.with_sharding_constraint(stack, PartitionSpec(free, *spec))


def constrain(array: jax.Array, logical: Sequence[str | None]) -> jax.Array:
    """Shards an array along the axes of the mesh in use that split it; its other axes are not split."""
    mesh = current_mesh()
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, mesh_axes(PartitionSpec(*logical), array.shape, mesh))


def split_size(logical: Sequence[str], shape: Sequence[int], name: str) -> int:
    """Returns the size of a logical axis on one device of the mesh in use."""
    index, mesh = list(logical).index(name), current_mesh()
    if mesh is None:
        return shape[index]
    return NamedSharding(mesh, mesh_axes(PartitionSpec(*logical), tuple(shape), mesh)).shard_shape(tuple(shape))[index]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over `data` and `expert`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that holds a whole leaf on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_whole(leaf: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Shards a leaf that every process holds on its host.

    Unlike `jax.device_put`, it does not first gather the leaf from all processes to compare it.
    """
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def whole_on_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """Returns a whole leaf on the host of every process. If processes hold parts of it, all of them must call this."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = jax.jit(lambda leaf: leaf, out_shardings=replicated(leaf.sharding.mesh))(leaf).addressable_data(0)
    return np.asarray(leaf)


def share_of(sharding: NamedSharding, process: int | None = None) -> Share:
    """Returns the share of a batch that a process reads: the rows that its devices hold.

    Processes that hold a part in common (`model` crosses them) form a group, as do processes linked by a chain of such processes.
    A group reads the rows of all its parts. If groups have different numbers of parts, every process reads the whole batch.

    Args:
      sharding: see `batch_sharding`.
      process: index of the process; None for this one.
    """
    return _shares(sharding)[jax.process_index() if process is None else process]


@functools.lru_cache
def _shares(sharding: NamedSharding) -> dict[int, Share]:
    """Returns the shares of all processes."""
    of = batch_shards(sharding.mesh)
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.devices_indices_map((of,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    groups: list[set[int]] = []
    for parts in held.values():
        apart = [group for group in groups if not group & parts]
        groups = [*apart, parts.union(*(group for group in groups if group & parts))]
    if len({len(group) for group in groups}) > 1:
        groups = [set().union(*groups)]
    groups.sort(key=min)
    readers = [Share(index, len(groups), tuple(sorted(group)), of) for index, group in enumerate(groups)]
    return {process: next(reader for reader in readers if parts <= {*reader.parts}) for process, parts in held.items()}


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding, share: Share = WHOLE) -> dict[str, jax.Array]:
    """Places a global batch on the mesh.

    Args:
      batch: the rows of `share` of each feature.
      sharding: see `batch_sharding`.
      share: the share that this process has read: that of `share_of`, or the whole batch.
    """

    def put(rows: np.ndarray) -> jax.Array:
        size = len(rows) // len(share.parts)

        def held(index: tuple[slice, ...]) -> np.ndarray:
            first, stop, _ = index[0].indices(size * share.of)
            row = share.parts.index(first // size) * size + first % size
            return rows[row : row + stop - first]

        return jax.make_array_from_callback((size * share.of, *rows.shape[1:]), sharding, held)

    return {name: put(rows) for name, rows in batch.items()}


def batches(data: DataSource | Kept, start: int, sharding: NamedSharding) -> Iterator[dict[str, jax.Array]]:
    """Yields the global batches of a data source from `start`; each process reads its share of them."""
    share = share_of(sharding)
    for batch in data.batches(start, share=share):
        yield put_batch(batch, sharding, share)


def check_batch(batch_size: int, mesh: Mesh, num_microbatches: int, binding: str) -> None:
    """Raises UserError unless the batch divides among microbatches and devices."""
    parts = batch_shards(mesh)
    if batch_size % (parts * num_microbatches):
        raise UserError(
            f'{binding} = {batch_size} does not divide into {num_microbatches} microbatches over the {parts} devices of '
            f'the data and expert axes: make it a multiple of {parts * num_microbatches}.'
        )
