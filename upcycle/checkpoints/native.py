"""Our own format: Orbax step folders `MODEL_DIR/checkpoints/STEP/` with the items `state`, `data` and `metadata`.

`state` is a plain nested dict {step, params, opt_state, rng} of arrays. Names on disk are the keys on the path to each leaf, so
optimizer states are dicts, too (Orbax stores optax NamedTuples by position, and a changed chain would silently shift them), and
random keys are raw `uint32` data (`jax.random.key_data`).
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
from upcycle.checkpoints.hf import companions
from upcycle.errors import DifferentLeaves, Unavailable, UserError, writing_to

_LEAVES_IN_FLIGHT = 8  # hides the latency of object stores; each takes the host memory of a leaf
# Seconds that processes wait for process 0 to commit a step. Orbax's default, 600, is too short for slow disks.
_LONGEST_SAVE = 3600
_policies = ocp.checkpoint_managers
_LOGGERS = ('absl', 'asyncio')  # to which Orbax logs failures
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in messages of TensorStore


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
        """The JSON item with the position of the input pipeline."""
        return self._json('data')

    def _json(self, item: str) -> Mapping[str, Any]:
        return json_files.read_json(epath.Path(self.path) / item / 'metadata')


class NativeLayout(folder_writer.Layout):
    """Our own format, written part by part; see `folder_writer.Layout`. Orbax can restore it."""

    format = 'upcycle'
    state = 'state'
    reader = NativeReader

    def final(self, path: epath.Path, step: int | None) -> epath.Path:
        """A step of a run folder; 0 if the step is unknown."""
        return path / 'checkpoints' / str(step or 0)

    def place(self, leaves: writing.Leaves) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Every leaf has a place."""
        return {name: tuple(name.split('/')) for name in leaves}, {}

    def zarr(self, leaf: jax.ShapeDtypeStruct, chunks: list[int]) -> dict[str, Any]:
        """Uncompressed: weights hardly compress, and compressors are slower than disks."""
        return {
            'driver': 'zarr3',
            'metadata': {
                'shape': list(leaf.shape),
                'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': chunks}},
                # All chunks in one folder, as files `0.0.0`.
                'chunk_key_encoding': {'name': 'v2', 'configuration': {'separator': '.'}},
                'codecs': [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}],
            },
        }

    def commit(self, writer: folder_writer.FolderWriter, metadata: Mapping[str, Any]) -> None:
        """The index and the JSON items."""
        shapes = {keys: writer.leaves[name].shape for name, keys in writer.keys.items()}
        (writer.folder / self.state / orbax_item.ORBAX_INDEX).write_text(orbax_item.orbax_index(shapes, zarr3=True))
        kept = {name: value for name, value in metadata.items() if name != companions.KEY}
        for item, content in (('data', {}), ('metadata', kept)):
            (writer.folder / item).mkdir(exist_ok=True)
            (writer.folder / item / 'metadata').write_text(json.dumps(content))
        companions.copy(metadata.get(companions.KEY), writer.folder / 'metadata' / companions.FOLDER)
        orbax_item.mark_finished(writer.folder, (self.state, 'data', 'metadata'))


@dataclasses.dataclass(frozen=True)
class _Linked:
    """Preserves steps that the user has moved and replaced by a link, which Orbax cannot remove."""

    folder: epath.Path

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """See `orbax.checkpoint.checkpoint_managers.PreservationPolicy`."""
        return [os.path.islink(self.folder / str(checkpoint.step)) for checkpoint in checkpoints]


class CheckpointManager:
    """Saves and restores the steps of one run. A run must have one manager: opening it removes interrupted saves.

    Args:
      model_dir: the run's folder; steps are in its `checkpoints`.
      keep: how many of the newest steps to keep; None keeps all. Steps that are links are kept, too.
    """

    def __init__(self, model_dir: str | os.PathLike[str], *, keep: int | None = 1):
        if keep is not None and keep < 1:
            raise UserError(f'keep is {keep}: it must be at least 1, or None.')
        self._folder = files.absolute(model_dir) / 'checkpoints'
        kept = [_policies.LatestN(keep), _Linked(self._folder)]
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_is_no_failed_save)
        # Not by Orbax's option, whose background thread logs an error if the program ends first. No process can have begun a
        # save yet, because all wait for the first one in it.
        if jax.process_index() == 0:
            with writing_to(self._folder):
                for interrupted in ocp.utils.tmp_checkpoints(self._folder):
                    interrupted.get().rmtree()
        self._saving: tuple[int, dict[str, Any]] | None = None
        hashing.serve()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_policies.AnyPreservationPolicy(kept),
            # Process 0 calls it when everything is written, before the step gets its name and older steps are removed.
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
        """Copies `state` to the host, then writes it atomically in the background. The next call raises its failure.

        Raises:
          UserError: `step` is not larger than the newest one, a leaf holds NaN or infinity, or the folder cannot be written.
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
        # The optimizer casts, and its numbers may have overflowed.
        casts.require_finite_state(arrays_of, f'step {step} is not saved to {self._folder}')
        # Orbax serializes JSON in the background, while training updates these dictionaries.
        data, metadata = copy.deepcopy((data, metadata))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), metadata=ocp.args.JsonSave(metadata)
        )
        self.wait()
        self._saving = step, leaves
        with self._failed_saves():
            self._manager.save(step, args=items, force=True)

    def latest_step(self) -> int | None:
        """Returns the newest step, finished or being written; None if there are no steps."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract_state: Mapping[str, Any]) -> tuple[dict[str, Any], dict, dict]:
        """Returns the state, data and metadata of `step`.

        Args:
          step: a finished step.
          abstract_state: the state as `jax.ShapeDtypeStruct`s with shardings on any number of devices. Names, shapes and dtypes
            must equal the stored ones.

        Raises:
          UserError: the step does not exist, leaves differ (the message lists them), or files are damaged.
          TypeError: `abstract_state` is not a plain nested dict of arrays, or a leaf has no sharding.
        """
        self._manager.wait_until_finished()
        wanted = flatten(abstract_state)
        if unplaced := [name for name, leaf in wanted.items() if getattr(leaf, 'sharding', None) is None]:
            raise TypeError(f'every leaf of an abstract state needs a sharding; these have none: {", ".join(unplaced)}')
        if step not in self._manager.all_steps():
            raise UserError(f'{self._folder} has no finished step {step}, only {sorted(self._manager.all_steps())}.')
        reader = NativeReader(self._folder / str(step))
        _require_same(reader.path, reader.leaves(), wanted)
        # Orbax's restore rereads the index, and prints thousands of lines if a file is damaged.
        with concurrent.futures.ThreadPoolExecutor(_LEAVES_IN_FLIGHT) as pool:
            values = pool.map(lambda name: reader.read(name, wanted[name].sharding), wanted)
            read = dict(zip(wanted, values, strict=True))
        return _nest(abstract_state, read), dict(reader.data), dict(reader.metadata)

    def wait(self) -> None:
        """Waits for the current save.

        Raises:
          UserError: the save failed; earlier steps are unchanged.
        """
        with self._failed_saves():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the threads. The manager must not be used again."""
        with self._failed_saves():
            self._manager.close()
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(_is_no_failed_save)

    def _seal(self) -> None:
        """Checks the leaves of a step that is about to be committed, and writes the checksums of its files."""
        if files.is_remote(self._folder):
            return  # object stores check uploads, and reading everything back takes as long as writing it
        step, leaves = self._saving
        unfinished = [path for path in ocp.utils.tmp_checkpoints(self._folder) if path.get_final().name == str(step)]
        folder = unfinished[0].get()
        if NativeReader(folder).leaves() != leaves:
            raise OSError(f'{folder} does not hold the leaves that were saved')
        integrity.write_record(folder)

    @contextlib.contextmanager
    def _failed_saves(self) -> Iterator[None]:
        """Converts errors of TensorStore, the disk and the bucket during a save."""
        try:
            yield
        except Exception as error:
            step = self._saving[0] if self._saving else None
            if files.is_remote(self._folder) and (refusal := files.refused_by_bucket(error, [os.fspath(self._folder)])):
                raise type(refusal)(f'step {step} cannot be saved: {refusal}') from error
            if isinstance(error, TimeoutError):
                raise Unavailable(
                    f'step {step} cannot be saved to {self._folder}: another process did not answer ({error}). Repeat the '
                    'command: it resumes from the newest step.'
                ) from error
            if not isinstance(error, OSError | ValueError):
                raise
            code = _OS_ERROR.search(str(error))
            number = int(code[1]) if code else getattr(error, 'errno', None)
            reason = os.strerror(number) if number else ' '.join(str(error).split())
            raise UserError(
                f'step {step} cannot be saved to {self._folder} ({reason}): earlier steps are unchanged. Make the folder '
                'writable and repeat the command: it resumes from the newest step.'
            ) from error

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_no_failed_save(record: logging.LogRecord) -> bool:
    """Filters out failed saves, which Orbax logs several times with a traceback before it raises them."""
    return record.exc_info is None or 'orbax' not in record.pathname + record.getMessage()


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a plain nested dict of arrays or `jax.ShapeDtypeStruct`s by their names on disk.

    Raises:
      TypeError: a node is not a dict, a leaf is not an array or is a typed random key, or a key is empty or contains `/` or
        `.`, the separators of names.
    """
    leaves: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if type(node) is dict:
            for key, child in node.items():
                if not isinstance(key, str) or not key or '/' in key or '.' in key:
                    raise TypeError(f'key {key!r} below {prefix or "the root"!r} cannot name a leaf of a checkpoint')
                visit(f'{prefix}/{key}' if prefix else key, child)
        elif not isinstance(node, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f'{prefix!r} is a {type(node).__name__}: a state must be plain nested dicts of arrays')
        elif jax.numpy.issubdtype(node.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f'{prefix!r} is a typed random key: save jax.random.key_data(key) and wrap it after restoring'
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
    """Raises DifferentLeaves unless all names, shapes and dtypes are equal."""
    theirs, ours = (
        {name: f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}' for name, leaf in leaves.items()}
        for leaves in (stored, wanted)
    )
    problems = [f'only in the checkpoint: {name} {theirs[name]}' for name in theirs.keys() - ours.keys()]
    problems += [f'only in the model: {name} {ours[name]}' for name in ours.keys() - theirs.keys()]
    problems += [
        f'different: {name} is {theirs[name]} in the checkpoint, {ours[name]} in the model'
        for name in theirs.keys() & ours.keys()
        if theirs[name] != ours[name]
    ]
    if problems:
        heading = f'{path} was saved by another configuration: name the one it was trained with, or another MODEL_DIR'
        raise DifferentLeaves(heading, sorted(problems))
