"""Our own format: Orbax step folders `MODEL_DIR/checkpoints/STEP/` with the items `state`, `data` and `metadata`.

`state` is the plain nested dict {step, params, opt_state, rng} of arrays. Its names on disk are the keys on the way to
each leaf, so optimizer states come as dicts too (optax NamedTuples would be stored by position, and a changed chain
would silently shift them), and random keys as raw `uint32` data (`jax.random.key_data`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from upcycle import casts, files
from upcycle.checkpoints import arrays, folder_writer, hashing, integrity, json_files, orbax_item, writing
from upcycle.errors import DifferentLeaves, Unavailable, UserError, writing_to

# Hides the latency of object stores; each costs the host memory of a leaf.
_LEAVES_IN_FLIGHT = 8
# Seconds for which the other processes wait until process 0 has given a step its name; Orbax's own 600 are few for a slow disk.
_LONGEST_SAVE = 3600
_policies = ocp.checkpoint_managers
# Where Orbax's failures are logged.
_LOGGERS = ('absl', 'asyncio')
# How TensorStore names the system's reason.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


class NativeReader(arrays.ArrayReader):
    """A lazy view of one of our steps; see `upcycle.checkpoints.Reader`."""

    format = 'upcycle'

    def __init__(self, path: epath.Path, sources: Mapping[tuple[str, ...], arrays.Source] | None = None):
        if sources is None:
            sources = orbax_item.orbax_arrays(path / 'state')
        super().__init__(path, {'/'.join(keys): source for keys, source in sources.items()})

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The JSON item: family, configuration, sunk cost, receipt."""
        return json_files.checked_metadata(f'{self.path}/metadata', self._json('metadata'))

    @functools.cached_property
    def data(self) -> Mapping[str, Any]:
        """The JSON item that says where the input pipeline stood."""
        return self._json('data')

    def _json(self, item: str) -> Mapping[str, Any]:
        return json_files.read_json(epath.Path(self.path) / item / 'metadata')


class NativeLayout:
    """Our own format, written part by part; see `folder_writer.Layout`. Orbax restores it as if it had saved it."""

    format = 'upcycle'
    state = 'state'

    def final(self, path: epath.Path, step: int | None) -> epath.Path:
        """A step of a run folder; 0 stands for a model that does not know how long it was trained."""
        return path / 'checkpoints' / str(step or 0)

    def place(self, leaves: writing.Leaves) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Any tree has a place."""
        return {name: tuple(name.split('/')) for name in leaves}, {}

    def is_inline(self, keys: tuple[str, ...]) -> bool:
        """Every array has a folder."""
        return False

    def zarr(self, leaf: jax.ShapeDtypeStruct, chunks: list[int]) -> dict[str, Any]:
        """Uncompressed: weights hardly shrink, and a compressor is slower than a disk."""
        return {
            'driver': 'zarr3',
            'metadata': {
                'shape': list(leaf.shape),
                'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': chunks}},
                # Chunks `0.0.0` in one folder, not folders within folders.
                'chunk_key_encoding': {'name': 'v2', 'configuration': {'separator': '.'}},
                'codecs': [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}],
            },
        }

    def commit(self, writer: folder_writer.FolderWriter, metadata: Mapping[str, Any]) -> None:
        """The index and the JSON items."""
        shapes = {keys: writer.leaves[name].shape for name, keys in writer.keys.items()}
        (writer.folder / self.state / orbax_item.ORBAX_INDEX).write_text(orbax_item.orbax_index(shapes, zarr3=True))
        for item, content in (('data', {}), ('metadata', dict(metadata))):
            (writer.folder / item).mkdir(exist_ok=True)
            (writer.folder / item / 'metadata').write_text(json.dumps(content))
        orbax_item.mark_finished(writer.folder, (self.state, 'data', 'metadata'))

    def reader(self, folder: epath.Path) -> NativeReader:
        """See `folder_writer.Layout`."""
        return NativeReader(folder)


@dataclasses.dataclass(frozen=True)
class _Linked:
    """Preserves steps that are links: somebody has moved them elsewhere, and Orbax cannot remove a link."""

    folder: epath.Path

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """See `orbax.checkpoint.checkpoint_managers.PreservationPolicy`."""
        return [os.path.islink(self.folder / str(checkpoint.step)) for checkpoint in checkpoints]


class CheckpointManager:
    """Saves and restores the steps of one run. One writer a run: opening it removes what an interrupted save left.

    Args:
        model_dir: the run's folder; steps lie in its `checkpoints`.
        keep: how many of the newest steps to keep; None keeps all. A step that is a link is kept, too.
    """

    def __init__(self, model_dir: str | os.PathLike[str], *, keep: int | None = 1):
        if keep is not None and keep < 1:
            raise UserError(f'keep is {keep}: it is at least 1, or None.')
        self._folder = files.absolute(model_dir) / 'checkpoints'
        kept = [_policies.LatestN(keep), _Linked(self._folder)]
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_is_no_failed_save)
        # Here and not by Orbax's option, whose background thread complains when the program ends first. No process can
        # have begun a save yet: they all wait for the first one there.
        if jax.process_index() == 0:
            with writing_to(self._folder):
                for interrupted in ocp.utils.tmp_checkpoints(self._folder):
                    interrupted.get().rmtree()
        self._saving: tuple[int, dict[str, Any]] | None = None
        hashing.serve()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_policies.AnyPreservationPolicy(kept),
            # By process 0, when everything is written, and before the step gets its name and older ones are removed.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal, timeout_secs=_LONGEST_SAVE),
        )
        handlers = {
            'state': ocp.StandardCheckpointHandler(),
            'data': ocp.JsonCheckpointHandler(),
            'metadata': ocp.JsonCheckpointHandler(),
        }
        with writing_to(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: Mapping[str, Any], data: dict, metadata: dict) -> None:
        """Copies `state` to the host and returns; writing continues in the background, and the step appears whole or not at all.

        A failure of the writing is raised by the next call.

        Raises:
            UserError: `step` is not past the newest saved one, a leaf holds numbers that are not finite, or the folder cannot be
                written.
            TypeError: `state` is not a plain nested dict of arrays.
        """
        arrays_of = flatten(state)
        leaves = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in arrays_of.items()}
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise UserError(
                f'step {step} cannot be saved: {self._folder} already holds step {newest}, '
                'so name another MODEL_DIR or delete the later steps.'
            )
        # Nothing is cast on the way to the disk; the optimizer casts, and numbers may have grown without bound.
        casts.require_finite_state(arrays_of, f'step {step} is not saved to {self._folder}')
        # Orbax serializes JSON in the background, while training continues to count in the dictionaries that it was given.
        data, metadata = copy.deepcopy((data, metadata))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), metadata=ocp.args.JsonSave(metadata)
        )
        self.wait()
        self._saving = step, leaves
        with self._failed_saves():
            self._manager.save(step, args=items, force=True)

    def latest_step(self) -> int | None:
        """The newest finished step (or the one being written), None where there is none."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract_state: Mapping[str, Any]) -> tuple[dict[str, Any], dict, dict]:
        """The state, data and metadata of `step`, on any number of devices.

        Args:
            abstract_state: the state as `jax.ShapeDtypeStruct`s, each with its sharding. Names, shapes and dtypes
                must be those stored: nothing is cast, padded, skipped or filled in.

        Raises:
            UserError: no such step, leaves that differ (all of them are listed), or damaged files.
            TypeError: `abstract_state` is not a plain nested dict of arrays, or a leaf has no sharding.
        """
        self._manager.wait_until_finished()
        wanted = flatten(abstract_state)
        if unplaced := [name for name, leaf in wanted.items() if getattr(leaf, 'sharding', None) is None]:
            raise TypeError(f'every leaf of an abstract state has a sharding; these have none: {", ".join(unplaced)}')
        if step not in self._manager.all_steps():
            raise UserError(f'{self._folder} has no finished step {step}, only {sorted(self._manager.all_steps())}.')
        reader = NativeReader(self._folder / str(step))
        _require_same(reader.path, reader.leaves(), wanted)
        # Not Orbax's restore: it rereads the index, and prints thousands of lines where a file is damaged.
        with concurrent.futures.ThreadPoolExecutor(_LEAVES_IN_FLIGHT) as pool:
            values = pool.map(lambda name: reader.read(name, wanted[name].sharding), wanted)
            read = dict(zip(wanted, values, strict=True))
        return _nest(abstract_state, read), dict(reader.data), dict(reader.metadata)

    def wait(self) -> None:
        """Returns when the save that is under way is finished.

        Raises:
            UserError: it could not be written; the steps before it are untouched.
        """
        with self._failed_saves():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the threads. The manager is not used again."""
        with self._failed_saves():
            self._manager.close()
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(_is_no_failed_save)

    def _seal(self) -> None:
        """Reads back the step that is about to get its name: it has the leaves that were saved, and its files get checksums."""
        if files.is_remote(self._folder):
            # Stores check what they are sent, and reading it all back takes as long as writing it.
            return
        step, leaves = self._saving
        unfinished = [path for path in ocp.utils.tmp_checkpoints(self._folder) if path.get_final().name == str(step)]
        folder = unfinished[0].get()
        if NativeReader(folder).leaves() != leaves:
            raise OSError(f'{folder} does not hold the leaves that were saved')
        integrity.write_record(folder)

    @contextlib.contextmanager
    def _failed_saves(self) -> Iterator[None]:
        """TensorStore and the system say that a disk is full by exceptions of their own."""
        try:
            yield
        except Exception as error:
            step = self._saving[0] if self._saving else None
            if files.is_remote(self._folder) and (refusal := files.refused_by_bucket(error, [os.fspath(self._folder)])):
                raise type(refusal)(f'step {step} cannot be saved: {refusal}') from error
            if isinstance(error, TimeoutError):
                raise Unavailable(
                    f'step {step} cannot be saved to {self._folder}: another process did not answer ({error}); the same command '
                    'goes on from the newest step.'
                ) from error
            if not isinstance(error, OSError | ValueError):
                raise
            code = _OS_ERROR.search(str(error))
            number = int(code[1]) if code else getattr(error, 'errno', None)
            reason = os.strerror(number) if number else ' '.join(str(error).split())
            raise UserError(
                f'step {step} cannot be saved to {self._folder} ({reason}): the steps before it are as they were, and the same '
                'command goes on from the newest when the folder can be written again.'
            ) from error

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_no_failed_save(record: logging.LogRecord) -> bool:
    """Orbax logs a failed save several times, each with a traceback, and then raises it."""
    return record.exc_info is None or 'orbax' not in record.pathname + record.getMessage()


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a plain nested dict of arrays (or of their `jax.ShapeDtypeStruct`s) by their names on disk.

    Raises:
        TypeError: a node is not a dict, a leaf is not an array, a key is empty or has a `/` or `.` (they separate
            keys, here and on disk), or a leaf is a typed random key.
    """
    leaves: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if type(node) is dict:
            for key, child in node.items():
                if not isinstance(key, str) or not key or '/' in key or '.' in key:
                    raise TypeError(f'key {key!r} below {prefix or "the root"!r} cannot name a leaf of a checkpoint')
                visit(f'{prefix}/{key}' if prefix else key, child)
        elif not isinstance(node, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f'{prefix!r} is a {type(node).__name__}: a state is plain nested dicts of arrays')
        elif jax.numpy.issubdtype(node.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f'{prefix!r} is a typed random key: save jax.random.key_data(key), wrap it again on restore'
            )
        else:
            leaves[prefix] = node

    visit('', tree)
    return leaves


def _nest(like: Mapping[str, Any], leaves: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    return {
        key: _nest(node, leaves, f'{prefix}{key}/') if isinstance(node, dict) else leaves[prefix + key]
        for key, node in like.items()
    }


def _require_same(path: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    def describe(leaf: Any) -> str:
        return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'

    differences = [f'only in the checkpoint: {name} {describe(stored[name])}' for name in stored.keys() - wanted.keys()]
    differences += [f'only in the model: {name} {describe(wanted[name])}' for name in wanted.keys() - stored.keys()]
    differences += [
        f'different: {name} is {describe(stored[name])} in the checkpoint, {describe(wanted[name])} in the model'
        for name in stored.keys() & wanted.keys()
        if describe(stored[name]) != describe(wanted[name])
    ]
    if differences:
        raise DifferentLeaves(
            f'{path} was saved by another configuration: name the one it was trained with, or another MODEL_DIR',
            sorted(differences),
        )
