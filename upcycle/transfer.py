"""`upcycle import` and `upcycle export`: convert checkpoints between formats, leaf by leaf."""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from upcycle import casts, schema
from upcycle.checkpoints import Reader, check_target, create_checkpoint, open_checkpoint
from upcycle.checkpoints.arrays import WEIGHT_DTYPES, require_finite
from upcycle.checkpoints.hf import companions
from upcycle.checkpoints.integrity import require_whole
from upcycle.checkpoints.writing import EXPERT, WHOLE, Region, WriteError, Writer
from upcycle.cost import num_bytes
from upcycle.errors import Unavailable, UserError
from upcycle.formats import ANY_FOLDER, FolderRequest
from upcycle.leaf_names import left_out, not_read
from upcycle.models import identify
from upcycle.progress import Progress

Leaves = dict[str, jax.ShapeDtypeStruct]
Part = tuple[str, Region, np.ndarray]

_READS_AHEAD = 2


def transfer(
    source: str,
    target: str,
    format: str,
    *,
    source_format: str | None = None,
    optimizer_state: str = 'keep',
    dtype: str | None = None,
    step: int | str | None = None,
    request: FolderRequest = ANY_FOLDER,
) -> str:
    """Converts a checkpoint to another format.

    Args:
      source: path of the checkpoint.
      target: path of the new checkpoint.
      format: of the new checkpoint.
      source_format: the required format of the source; None: any.
      optimizer_state: 'keep', or 'none' to leave it out.
      dtype: of the new parameters; None: unchanged.
      step: training steps taken, if the source does not record them.
      request: see `checkpoints.create_checkpoint`.

    Returns:
      The path of the new checkpoint.

    Raises:
      UserError: the source is damaged, or the format has no place for a leaf. No checkpoint that looks finished is left behind.
    """
    target = check_target(target, format, below_runs=format != 'upcycle')
    reader = open_checkpoint(source)
    require_whole(reader.path)
    if source_format is not None and reader.format != source_format:
        raise UserError(f'{reader.path} has the format {reader.format}, not {source_format}.')
    files = {companions.KEY: companions.of(reader.path, reader.format)}
    metadata = {name: value for name, value in reader.metadata.items() if name not in ('not_read', 'window')}
    stored = reader.leaves()
    if optimizer_state == 'none':
        stored = {name: leaf for name, leaf in stored.items() if not name.startswith('opt_state/')}
    facts = identify.facts_of(metadata)
    model = identify.check(reader.path, stored, facts)
    check_dtype(dtype)
    leaves = {name: with_dtype(name, leaf, dtype) for name, leaf in stored.items()}
    step = known_step(reader, step)
    if step is not None:
        leaves['step'] = jax.ShapeDtypeStruct((), np.int32)
    identity = {'from': reader.path, 'format': format, 'leaves': fingerprint(leaves)}
    metadata = {'family': model.family, **metadata, 'facts': facts}
    writer = create_checkpoint(target, format, leaves, step=step, identity=identity, metadata=metadata, request=request)
    for line in not_read(reader.metadata):
        print(line)
    with discarded_if_refused(writer):
        _check_clock(reader, writer, step)
        steps = {} if step is None else {'step': np.asarray(step, np.int32)}
        write(writer, _copies(reader, writer, leaves, steps), leaves)
        origin = {'path': reader.path, 'format': reader.format, 'step': step}
        writer.finish({**metadata, **files, 'source': origin})
    for line in left_out(writer.left_out):
        print(line)
    return writer.path


@contextlib.contextmanager
def discarded_if_refused(writer: Writer) -> Iterator[None]:
    """Discards the write on a UserError about the source. After other errors and interruptions, it stays and can continue."""
    try:
        yield
    except (WriteError, Unavailable):
        raise
    except UserError:
        writer.discard()
        raise
    finally:
        writer.close()


def known_step(reader: Reader, step: int | str | None) -> int | None:
    """Returns the step of a checkpoint, or the one that the user gave; None if unknown.

    Raises:
      UserError: the given step is invalid, or differs from the checkpoint's.
    """
    if isinstance(step, str) and re.fullmatch(r'-?[0-9]{1,100}', step):
        step = int(step)
    if step is not None and not schema.fits(step, schema.Whole):
        shown = step[:100] if isinstance(step, str) else schema.shown(step)
        raise UserError(f'--step={shown} must be {schema.in_words(schema.Whole)}.')
    if step is not None and reader.step is not None and step != reader.step:
        raise UserError(f'{reader.path} is at step {reader.step}: remove --step={step}.')
    return reader.step if step is None else step


# Segments of the names of parameters that are used in float32.
_FLOAT32 = {'router', 'router_state', 'shared_gate', 'mixing'}


def with_dtype(name: str, leaf: jax.ShapeDtypeStruct, dtype: str | None) -> jax.ShapeDtypeStruct:
    """Returns a leaf with the given dtype if it is a parameter. Router parameters, used in float32, keep theirs."""
    if dtype is None or not name.startswith('params/') or _FLOAT32 & {*name.split('/')}:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, jax.numpy.dtype(dtype))


def fingerprint(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """Hashes names, shapes and dtypes."""
    listing = [(name, list(leaf.shape), leaf.dtype.name) for name, leaf in sorted(leaves.items())]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def write(writer: Writer, made: Iterable[Part], leaves: Leaves) -> None:
    """Writes parts as they are made, and shows the progress."""
    done, total = 0, num_bytes([leaves[name] for name in writer.todo()])
    with Progress('writing', 'MB', total / 1e6) as progress:
        for name, region, value in made:
            writer.write(name, region, value)
            done += value.nbytes
            progress.show(done / 1e6, name)


def ahead(calls: Iterable[Callable[[], Any]], count: int = _READS_AHEAD) -> Iterator[Any]:
    """Yields the results of calls in order, with up to `count` more calls running in the background."""
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _copies(reader: Reader, writer: Writer, leaves: Leaves, steps: Mapping[str, np.ndarray]) -> Iterator[Part]:
    def read(name: str, region: Region, parts: Sequence[Region]) -> list[Part]:
        """Reads a region of a leaf once, and cuts it into parts, which are relative to the region."""
        value = steps[name] if name in steps else reader.read(name, region=region)
        require_finite(reader.path, name, value)
        value = casts.cast(name, value, leaves[name].dtype)
        return [(name, region or part, value[part]) for part in parts]

    def calls() -> Iterator[Callable[[], list[Part]]]:
        for name, regions in writer.todo().items():
            if EXPERT in name.split('/'):  # expert by expert, so that memory stays small
                yield from (functools.partial(read, name, region, [WHOLE]) for region in regions)
            else:  # whole, because a transposed leaf cannot be read in parts
                yield functools.partial(read, name, WHOLE, regions)

    for parts in ahead(calls()):
        yield from parts


def _check_clock(reader: Reader, writer: Writer, step: int | None) -> None:
    """Raises UserError if the format only stores the step, and the clock of the optimizer differs from it."""
    if 'opt_state/count' in writer.left_out and (count := int(reader.read('opt_state/count'))) != step:
        raise UserError(
            f'opt_state/count of {reader.path} is {count} but the step is {step}, and the format only has a step: leave the '
            'optimizer state out with --optimizer_state=none.'
        )


def check_dtype(dtype: str | None) -> None:
    """Raises UserError for a type that weights are not stored in."""
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise UserError(f'--dtype={dtype} must be one of {", ".join(WEIGHT_DTYPES)}.')
