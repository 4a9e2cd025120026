"""Checkpoints of every format behind one lazy, read-only view: names and shapes first, then one leaf at a time.

A leaf's name is flat and the same whatever wrote it: `params/encoder/layers_0/mlp/wi_0/kernel`,
`opt_state/param_states/<parameter>/v_row`, `opt_state/count`, `step`. Importing this module is cheap; the formats' own
libraries load when a checkpoint is opened.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from upcycle import files, outputs, warning
from upcycle.errors import UserError
from upcycle.formats import FORMATS as FORMATS

if TYPE_CHECKING:
    import jax
    import numpy as np
    from etils import epath

    from upcycle.checkpoints.arrays import ArrayReader
    from upcycle.checkpoints.writing import Writer

# A step's folder is `100` in our runs and `checkpoint_100` in T5X's.
_STEP = re.compile(r'(?:checkpoint_)?(\d+)')
# Orbax and T5X both write under another name and rename at the end, so these names are interrupted saves.
_UNFINISHED = re.compile(r'(?:checkpoint_)?(\d+)\.(?:orbax-checkpoint-tmp|tmp-).*')
_DAMAGED = re.compile(r'(\d+)\.damaged.*')  # as checkpoints.integrity sets steps aside
_LOOKED_FOR = (
    '`state/_METADATA` (Orbax: ours or T5X), `checkpoint` (T5X legacy), '
    'step folders `checkpoints/STEP`, `STEP`, `checkpoint_STEP`, `model.safetensors` with `config.json` (Hugging Face), '
    'or a file `.npz` (ViT)'
)
_MOST_LOOKED_AT = 100  # entries of a folder, in search of what else to name
# A part of an archive is named behind a colon, as big_vision does: `siglip.npz:img`.
_PART = re.compile(r'(.+\.npz):([\w/]+)')


@runtime_checkable
class Reader(Protocol):
    """One step of a checkpoint. Opening it reads an index; no array is read before `read`.

    Attributes:
        format: 'upcycle', 't5x_legacy', 't5x_orbax', 'vit_npz', ...
        path: the step's folder, or the file.
        step: training steps taken when it was saved; None where it does not say.
        metadata: the JSON saved with our own checkpoints (family, configuration, sunk cost, receipt). Of others `family`,
            and as `facts` what the format says of the model that shapes do not (its activation, its norms' epsilon, ...);
            {} where it says nothing.
    """

    format: str

    @property
    def path(self) -> str: ...

    @property
    def step(self) -> int | None: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every leaf's name, shape and dtype as stored, from metadata alone."""
        ...

    def read(
        self,
        name: str,
        sharding: jax.sharding.Sharding | None = None,
        dtype: Any = None,
        region: tuple[slice, ...] = (),
    ) -> jax.Array | np.ndarray:
        """One leaf, and only that leaf: on the host, or with a `sharding` each device's part straight onto it.

        On the host it may be a `region` of the leaf, such as one expert.

        Raises:
            UserError: there is no such leaf, or its stored bytes are missing or damaged.
        """
        ...


def open_checkpoint(path: str | os.PathLike[str]) -> Reader:
    """Opens a checkpoint of any format that we read; the format is found, not named.

    Args:
        path: a step's folder, a file, or a folder of steps (a run folder, its `checkpoints`, a T5X model directory), which
            means its newest finished step. `gs://` works.

    Raises:
        UserError: nothing is there, it holds no checkpoint, or only a save that never finished.
    """
    from upcycle.checkpoints.hf.folder import refuse_other_files

    folder, part = files.absolute(path), ''
    if match := _PART.fullmatch(os.fspath(folder)):
        folder, part = files.absolute(match[1]), match[2]
    if not folder.exists():
        raise UserError(f'{folder} does not exist: name a checkpoint, or a folder that holds one.')
    if folder.name == 'checkpoint' and folder.is_file():
        folder = folder.parent
    if _UNFINISHED.fullmatch(folder.name):
        raise UserError(f'{folder} is a save that was interrupted: name a finished step beside it.')
    if reader := _open_file(folder, part) or _open_step(folder):
        return reader
    steps = folder / 'checkpoints' if (folder / 'checkpoints').is_dir() else folder
    reader, passed_over = _open_newest_step(steps)
    if reader is not None:
        return reader
    if passed_over and all(map(_UNFINISHED.fullmatch, passed_over)):
        raise UserError(f'{steps} holds only saves that were interrupted ({", ".join(passed_over)}): name another run.')
    refuse_other_files(folder)
    if not passed_over and (found := _elsewhere(folder)):
        raise UserError(f'{folder} is no checkpoint itself: name {found}.')
    listing = ''.join(f'; {name} is passed over ({reason})' for name, reason in passed_over.items())
    way_out = ': copy the checkpoint again' if passed_over else ''
    raise UserError(f'{folder} holds no checkpoint that we read: looked for {_LOOKED_FOR}{listing}{way_out}.')


def _open_newest_step(steps: epath.Path) -> tuple[ArrayReader | None, dict[str, str]]:
    """The newest step of a folder that can be read, and those that cannot by their names, with the reason."""
    children = list(steps.iterdir()) if steps.is_dir() else []
    passed_over: dict[str, str] = {}
    for number, child in sorted(((_number(child.name), child) for child in children), reverse=True):
        if number < 0:
            break
        reader = _open_step(child) if _STEP.fullmatch(child.name) and child.is_dir() else None
        if reader is not None and not (missing := reader.missing()):
            for name, reason in passed_over.items():
                if _number(name) > number:
                    warning.once(f'{steps / name} is passed over and {child.name} is read: {reason}.')
            return reader, passed_over
        passed_over[child.name] = _why_not_read(child) if reader is None else _incomplete(missing)
    return None, passed_over


def _number(name: str) -> int:
    """The step of a step's folder, whatever became of it; -1 for other names."""
    match = _STEP.fullmatch(name) or _UNFINISHED.fullmatch(name) or _DAMAGED.fullmatch(name)
    return int(match[1]) if match else -1


def _elsewhere(folder: epath.Path) -> str | None:
    """Where a checkpoint lies instead, on this machine: above what was named, or up to two folders below it."""
    from upcycle.checkpoints import orbax_item
    from upcycle.checkpoints.hf.folder import find

    def holds_one(place: epath.Path) -> bool:
        indexes = ('checkpoint', f'state/{orbax_item.ORBAX_INDEX}')
        return find(place) or any((place / name).is_file() for name in indexes)

    def below(place: epath.Path) -> list[epath.Path]:
        return sorted(
            place.iterdir(), key=lambda child: [int(n) for n in re.findall(r'\d{1,18}', child.name)], reverse=True
        )

    if files.is_remote(folder):
        return None
    is_part = not folder.is_dir() or any((folder / name).exists() for name in (orbax_item.ORBAX_INDEX, '.zarray'))
    if is_part and holds_one(folder.parent):
        return f'the folder above it, {folder.parent}'
    if not folder.is_dir():
        return None
    children = below(folder)[:_MOST_LOOKED_AT]
    if archives := [child for child in children if child.name.endswith('.npz')]:
        return f'the file, {archives[0]}'
    folders = [child for child in children if child.is_dir()]
    with contextlib.suppress(OSError):  # one of them is closed to us
        folders += [inner for child in folders for inner in below(child)[:_MOST_LOOKED_AT] if inner.is_dir()]
    found = [place for place in folders if holds_one(place)]
    more = f', or another of the {len(found)} below it' if len(found) > 1 else ''
    return f'{found[0]}{more}' if found else None


def _incomplete(missing: Sequence[str]) -> str:
    verb = 'is' if len(missing) == 1 else 'are'
    return f'{len(missing)} of its arrays {verb} not there, such as {missing[0]}, so it cannot be read'


def _why_not_read(step: epath.Path) -> str:
    """Of a step's folder that `_open_step` does not know."""
    if _UNFINISHED.fullmatch(step.name):
        return 'its save was interrupted'
    if _DAMAGED.fullmatch(step.name):
        return 'it was set aside as damaged'
    if not step.is_dir():
        return 'it is a file, and steps are folders' if step.exists() else 'it is a link that leads nowhere'
    if not any(step.iterdir()):
        return 'it is empty'
    if (step / 'state' / '_METADATA').exists():
        return 'it has no commit_success.txt, so its save was interrupted'
    if items := sorted(child.name for child in step.iterdir() if (child / '_METADATA').exists()):
        return f'its Orbax item is `{items[0]}`, and T5X and this program write `state`'
    return 'it has neither `checkpoint` (T5X legacy) nor `state/_METADATA` (Orbax), so it was not copied as a whole'


def create_checkpoint(
    path: str | os.PathLike[str],
    format: str,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    *,
    step: int | None,
    identity: Mapping[str, Any],
    alike: Collection[str] = (),
) -> Writer:
    """Begins a checkpoint, or continues one that was cut off.

    Args:
        path: where it will be; the formats with steps make a folder for the step there.
        format: one of `FORMATS`.
        leaves: everything that will be written, by our names.
        step: training steps taken, None where that is not known.
        identity: what is being written from what, as JSON; a cut write continues only where it is the same.
        alike: leaves whose rows are all the same, such as experts that are copies.

    Raises:
        UserError: something is there already, a leaf has no counterpart in the format, or the space does not suffice.
    """
    from upcycle.checkpoints import flax_npz, folder_writer, native, t5x
    from upcycle.checkpoints.hf.writer import HuggingFaceWriter

    target = files.absolute(path)
    if format == 'vit_npz':
        return flax_npz.NpzWriter(target, leaves)
    if format == 'huggingface':
        return HuggingFaceWriter(target, leaves)
    layouts = (native.NativeLayout, t5x.LegacyLayout, t5x.OrbaxLayout)
    layout = {layout.format: layout for layout in layouts}[format]()
    return folder_writer.FolderWriter(layout, target, leaves, step, identity, alike)


def check_target(path: str | os.PathLike[str], format: str, *, below_runs: bool) -> epath.Path:
    """Whether a checkpoint can be written where `--to` names, before any work is done.

    Args:
        path: as the user gave it.
        format: one of `FORMATS`.
        below_runs: whether it may lie in a folder of a run's folder.

    Returns:
        The path in full.

    Raises:
        UserError: as `outputs.check`; or something is there already, for every format but an empty folder, or the beginning of
            the same write.
    """
    full = outputs.check('--to', path, outputs.Kind.NEW_FILE if format == 'vit_npz' else outputs.Kind.NEW_FOLDER)
    if not below_runs:
        outputs.refuse_runs(full)
    return full


def open_checkpoints(paths: str | os.PathLike[str] | Sequence[str]) -> Reader:
    """Opens a checkpoint, or several as one; see `several.SeveralReader`.

    Raises:
        UserError: as `open_checkpoint`.
    """
    if isinstance(paths, str | os.PathLike):
        return open_checkpoint(paths)
    from upcycle.checkpoints.several import SeveralReader

    if not paths:
        raise UserError('INITIAL_CHECKPOINT_PATH = () names no checkpoint: name one, or several.')
    readers = [open_checkpoint(path) for path in paths]
    return readers[0] if len(readers) == 1 else SeveralReader(readers)


def _open_file(file: epath.Path, part: str) -> ArrayReader | None:
    """The reader of a checkpoint that is a file, or None where it is none; `part` of an archive."""
    from upcycle.checkpoints import flax_npz
    from upcycle.checkpoints.hf.folder import NAMES
    from upcycle.checkpoints.hf.reader import HuggingFaceReader

    if file.name.endswith('.npz') and file.is_file():
        return flax_npz.NpzReader(file, part)
    if NAMES.fullmatch(file.name) and file.is_file():
        return HuggingFaceReader(file)
    return None


def _open_step(folder: epath.Path) -> ArrayReader | None:
    """The reader of one step's folder, or None where no finished checkpoint of a known format lies directly in it."""
    from upcycle.checkpoints import native, orbax_item, t5x
    from upcycle.checkpoints.hf.folder import find
    from upcycle.checkpoints.hf.reader import HuggingFaceReader

    if find(folder):
        return HuggingFaceReader(folder)
    if (folder / 'checkpoint').is_file():
        return t5x.LegacyReader(folder)
    if not orbax_item.is_finished(folder) or not (folder / 'state' / orbax_item.ORBAX_INDEX).exists():
        return None
    sources = orbax_item.orbax_arrays(folder / 'state')
    reader = t5x.OrbaxReader if any(keys[0] == 'target' for keys in sources) else native.NativeReader
    return reader(folder, sources)
