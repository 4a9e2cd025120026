"""Reads and writes checkpoints of all formats. Readers are lazy: names and shapes first, then one leaf at a time.

Leaf names are flat and the same in every format: `params/encoder/layers_0/mlp/wi_0/kernel`,
`opt_state/param_states/<parameter>/v_row`, `opt_state/count`, `step`. Importing this module is cheap; the libraries of a format
load when a checkpoint is opened.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from upcycle import files, folders, outputs, warning
from upcycle.errors import UserError
from upcycle.formats import ANY_FOLDER, FolderRequest
from upcycle.formats import FORMATS as FORMATS

if TYPE_CHECKING:
    import jax
    import numpy as np
    from etils import epath

    from upcycle.checkpoints.arrays import ArrayReader
    from upcycle.checkpoints.views import Region
    from upcycle.checkpoints.writing import Writer

_STEP = re.compile(r'(?:checkpoint_)?(\d+)')  # step folders: `100` (ours) or `checkpoint_100` (T5X)
# Orbax and T5X write under a temporary name and rename at the end, so such a name is an interrupted save.
_UNFINISHED = re.compile(r'(?:checkpoint_)?(\d+)\.(?:orbax-checkpoint-tmp|tmp-).*')
_DAMAGED = re.compile(r'(\d+)\.damaged.*')  # as renamed by checkpoints.integrity
_LOOKED_FOR = (
    '`state/_METADATA` (Orbax: ours or T5X), `checkpoint` (T5X legacy), '
    'step folders `checkpoints/STEP`, `STEP`, `checkpoint_STEP`, `model.safetensors` with `config.json` (Hugging Face), '
    'an `.npz` file (ViT), or a `.gguf` file (llama.cpp)'
)
_MAX_SEARCHED = 100  # entries of a folder that are searched for a checkpoint to suggest
_PART = re.compile(r'(.+\.npz):([\w/]+)')  # a subtree of an archive, in big_vision's notation: `siglip.npz:img`


@runtime_checkable
class Reader(Protocol):
    """One step of a checkpoint. Opening it reads the index; arrays are only read by `read`.

    Attributes:
      format: one of `formats.READ`.
      path: the step's folder, or the file.
      step: training steps taken at the save; None if the checkpoint does not record them.
      metadata: the JSON saved with our checkpoints (family, configuration, sunk cost, receipt). For other formats, `family` with
        `facts`, what the format records and shapes do not tell (activation, norm epsilon, ...), or with `model`, which describes
        the whole model. {} if nothing is recorded.
    """

    format: str

    @property
    def path(self) -> str: ...

    @property
    def step(self) -> int | None: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns each leaf's name with its stored shape and dtype, from metadata alone."""

    def read(
        self, name: str, sharding: jax.sharding.Sharding | None = None, dtype: Any = None, region: Region = ()
    ) -> jax.Array | np.ndarray:
        """Reads one leaf: to the host, or, given a `sharding`, each shard directly onto its device.

        Without a sharding, `region` selects a part of the leaf, such as one expert, and the array may have any memory order: that
        of the file, where a leaf is stored transposed.

        Raises:
          UserError: the leaf does not exist, or its stored bytes are missing or damaged.
        """


def open_checkpoint(path: str | os.PathLike[str]) -> Reader:
    """Opens a checkpoint and detects its format.

    Args:
      path: a step's folder, a file, or a folder of steps (a run folder, its `checkpoints`, a T5X model directory), of which the
        newest finished step is opened. Local or in a bucket (`gs://`, `s3://`).

    Raises:
      UserError: the path does not exist, or holds no finished checkpoint of a known format.
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
        raise UserError(f'{folder} is an interrupted save: name a finished step next to it.')
    if reader := _open_file(folder, part) or _open_step(folder):
        return reader
    steps = folder / 'checkpoints' if (folder / 'checkpoints').is_dir() else folder
    reader, skipped = _open_newest_step(steps)
    if reader is not None:
        return reader
    if skipped and all(map(_UNFINISHED.fullmatch, skipped)):
        raise UserError(f'{steps} holds only interrupted saves ({", ".join(skipped)}): name another run.')
    if folders.holds_tokens(folder):
        raise UserError(
            f'{folder} holds token shards of `upcycle tokenize` and no model: name the model here, and the shards by TOKENS_DIR.'
        )
    refuse_other_files(folder)
    if not skipped and (suggestion := _suggest(folder)):
        raise UserError(f'{folder} is not a checkpoint: name {suggestion}.')
    listing = ''.join(f'; {name} is skipped ({reason})' for name, reason in skipped.items())
    way_out = ': copy the checkpoint again' if skipped else ''
    raise UserError(f'{folder} holds no checkpoint of a known format: looked for {_LOOKED_FOR}{listing}{way_out}.')


def _open_newest_step(steps: epath.Path) -> tuple[ArrayReader | None, dict[str, str]]:
    """Opens the newest readable step of a folder; also returns why each skipped step cannot be read, by name."""
    children = list(steps.iterdir()) if steps.is_dir() else []
    skipped: dict[str, str] = {}
    for number, child in sorted(((_number(child.name), child) for child in children), reverse=True):
        if number < 0:
            break
        reader = _open_step(child) if _STEP.fullmatch(child.name) and child.is_dir() else None
        if reader is not None and not (missing := reader.missing()):
            for name, reason in skipped.items():
                if _number(name) > number:
                    warning.once(f'{steps / name} is skipped ({reason}): {child.name} is read instead.')
            return reader, skipped
        skipped[child.name] = (
            _why_not_read(child) if reader is None else f'missing arrays: {len(missing)}, such as {missing[0]}'
        )
    return None, skipped


def _number(name: str) -> int:
    """Returns the step in the name of a finished, interrupted or damaged step folder; -1 for other names."""
    match = _STEP.fullmatch(name) or _UNFINISHED.fullmatch(name) or _DAMAGED.fullmatch(name)
    return int(match[1]) if match else -1


def _suggest(folder: epath.Path) -> str | None:
    """Searches the local folder above and up to two levels below for a checkpoint that the user may have meant."""
    from upcycle.checkpoints import orbax_item
    from upcycle.checkpoints.hf.folder import has_safetensors

    def holds_checkpoint(place: epath.Path) -> bool:
        indexes = ('checkpoint', f'state/{orbax_item.ORBAX_INDEX}')
        return has_safetensors(place) or any((place / name).is_file() for name in indexes)

    def newest_first(place: epath.Path) -> list[epath.Path]:
        def numbers(child: epath.Path) -> list[int]:
            return [int(n) for n in re.findall(r'\d{1,18}', child.name)]

        return sorted(place.iterdir(), key=numbers, reverse=True)[:_MAX_SEARCHED]

    if files.is_remote(folder):
        return None
    is_part = not folder.is_dir() or any((folder / name).exists() for name in (orbax_item.ORBAX_INDEX, '.zarray'))
    if is_part and holds_checkpoint(folder.parent):
        return f'the folder above it, {folder.parent}'
    if not folder.is_dir():
        return None
    children = newest_first(folder)
    if archives := [child for child in children if child.name.endswith(('.npz', '.gguf'))]:
        return f'the file, {archives[0]}'
    folders = [child for child in children if child.is_dir()]
    with contextlib.suppress(OSError):  # a folder without read permission
        folders += [inner for child in folders for inner in newest_first(child) if inner.is_dir()]
    checkpoints = [place for place in folders if holds_checkpoint(place)]
    more = f', or another of the {len(checkpoints)} below it' if len(checkpoints) > 1 else ''
    return f'{checkpoints[0]}{more}' if checkpoints else None


def _why_not_read(step: epath.Path) -> str:
    """Says why `_open_step` does not recognise a step's folder."""
    if _UNFINISHED.fullmatch(step.name):
        return 'its save was interrupted'
    if _DAMAGED.fullmatch(step.name):
        return 'it was set aside as damaged'
    if not step.is_dir():
        return 'it is a file, and steps are folders' if step.exists() else 'it is a dangling link'
    if not any(step.iterdir()):
        return 'it is empty'
    if (step / 'state' / '_METADATA').exists():
        return 'it has no commit_success.txt, so its save was interrupted'
    if items := sorted(child.name for child in step.iterdir() if (child / '_METADATA').exists()):
        return f'its Orbax item is `{items[0]}` instead of `state`, the name that T5X and upcycle use'
    return 'it has neither `checkpoint` (T5X legacy) nor `state/_METADATA` (Orbax), so the copy is incomplete'


def create_checkpoint(
    path: str | os.PathLike[str],
    format: str,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    *,
    step: int | None,
    identity: Mapping[str, Any],
    metadata: Mapping[str, Any],
    alike: Collection[str] = (),
    request: FolderRequest = ANY_FOLDER,
) -> Writer:
    """Begins a checkpoint, or continues an interrupted write of the same checkpoint.

    Args:
      path: of the checkpoint; formats with steps make a folder for the step below it.
      format: one of `FORMATS`.
      leaves: all leaves that will be written, by our names.
      step: training steps taken; None if unknown.
      identity: JSON that identifies source and result; an interrupted write continues only if it is equal.
      metadata: what `Writer.finish` will be given, as far as it describes the model: `facts` or `model`, and `model_type`.
      alike: leaves whose rows are all equal, such as experts that are copies.
      request: for a folder of Hugging Face, its layout and the engines that must compute it.

    Raises:
      UserError: the path exists, the format has no place for a leaf, or the disk is too full.
    """
    from upcycle.checkpoints import flax_npz
    from upcycle.checkpoints.hf.writer import HuggingFaceWriter

    target = files.absolute(path)
    if format == 'vit_npz':
        return flax_npz.NpzWriter(target, leaves)
    if format == 'huggingface':
        return HuggingFaceWriter(target, leaves, metadata, identity, request)
    from upcycle.checkpoints import folder_writer, native, t5x

    layout = next(kind for kind in (native.NativeLayout, t5x.LegacyLayout, t5x.OrbaxLayout) if kind.format == format)
    return folder_writer.FolderWriter(layout(), target, leaves, step, identity, alike)


def check_target(path: str | os.PathLike[str], format: str, *, below_runs: bool) -> epath.Path:
    """Checks that a checkpoint can be written to `--to`, before any work.

    Args:
      path: as the user gave it.
      format: one of `FORMATS`.
      below_runs: whether the path may lie in the folder of a run.

    Returns:
      The absolute path.

    Raises:
      UserError: as `outputs.check`, or the path exists. An empty folder or an interrupted write of a checkpoint is accepted.
    """
    full = outputs.check('--to', path, outputs.Kind.NEW_FILE if format == 'vit_npz' else outputs.Kind.NEW_FOLDER)
    if not below_runs:
        outputs.refuse_runs(full)
    return full


def open_checkpoints(paths: str | os.PathLike[str] | Sequence[str]) -> Reader:
    """Opens one checkpoint, or several behind one reader (`several.SeveralReader`); raises as `open_checkpoint`."""
    if isinstance(paths, str | os.PathLike):
        return open_checkpoint(paths)
    from upcycle.checkpoints.several import SeveralReader

    if not paths:
        raise UserError('INITIAL_CHECKPOINT_PATH = () is empty: name at least one checkpoint.')
    readers = [open_checkpoint(path) for path in paths]
    return readers[0] if len(readers) == 1 else SeveralReader(readers)


def _open_file(file: epath.Path, part: str) -> ArrayReader | None:
    """Opens a checkpoint that is a file (`part`: a subtree of an `.npz`); None if the path is not one."""
    from upcycle.checkpoints import flax_npz
    from upcycle.checkpoints.gguf import reader as gguf
    from upcycle.checkpoints.hf.folder import NAMES
    from upcycle.checkpoints.hf.reader import HuggingFaceReader

    if file.name.endswith('.npz') and file.is_file():
        files.require_file(file)
        return flax_npz.NpzReader(file, part)
    if file.name.endswith(gguf.SUFFIX) and file.is_file():
        return gguf.GgufReader(file)
    if NAMES.fullmatch(file.name) and file.is_file():
        return HuggingFaceReader(file)
    return None


def _open_step(folder: epath.Path) -> ArrayReader | None:
    """Opens one step's folder; None if it does not directly contain a finished checkpoint of a known format."""
    from upcycle.checkpoints.hf.folder import has_safetensors
    from upcycle.checkpoints.hf.reader import HuggingFaceReader

    if has_safetensors(folder):
        return HuggingFaceReader(folder)
    from upcycle.checkpoints import native, orbax_item, t5x

    if (folder / 'checkpoint').is_file():
        return t5x.LegacyReader(folder)
    if not orbax_item.is_finished(folder) or not (folder / 'state' / orbax_item.ORBAX_INDEX).exists():
        return None
    sources = orbax_item.orbax_arrays(folder / 'state')
    reader = t5x.OrbaxReader if any(keys[0] == 'target' for keys in sources) else native.NativeReader
    return reader(folder, sources)
