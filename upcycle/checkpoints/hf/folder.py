"""Chooses the file of a Hugging Face folder as transformers does, and explains folders that cannot be read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from upcycle import schema, warning
from upcycle.checkpoints import json_files
from upcycle.checkpoints.hf.sources import CONFIG
from upcycle.checkpoints.safetensors import INDEX, SINGLE, indexed_files
from upcycle.errors import UserError

# Names of files of other kinds.
_ADAPTER = 'adapter_config.json'
_PICKLES = re.compile(r'pytorch_model.*\.bin(\.index\.json)?|.*\.(pt|pth|ckpt|pkl)')
_OTHER_PROGRAMS = re.compile(
    r'(tf_model.*\.h5|flax_model.*\.msgpack|model.*\.onnx|.*\.ckpt-\d+\.index'
    r'|global_step\d+|zero_to_fp32\.py|pytorch_model_fsdp_\d+|.*\.distcp)'  # DeepSpeed, FSDP
)
NAMES = re.compile(r'.*\.safetensors(\.index(\.\w+)?\.json)?')  # arrays or an index, perhaps of a variant
_SHARD = re.compile(r'.*-\d{5}-of-\d{5}\.safetensors')


def has_safetensors(folder: epath.Path) -> bool:
    """Whether a folder holds `model.safetensors` or its index."""
    return any((folder / name).exists() for name in (SINGLE, INDEX))


def refuse_other_files(folder: epath.Path) -> None:
    """Refuses a file, or a folder without `model.safetensors` and its index, whose kind is known.

    Raises:
      UserError: there is an adapter, a file with another name, or a file of another program.
    """
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else [folder.name]
    folder = folder if folder.is_dir() else folder.parent
    if links := [name for name in (SINGLE, INDEX) if name in names and not (folder / name).exists()]:
        raise UserError(f'{folder / links[0]} is a dangling link: copy the checkpoint again, following links.')
    refuse_adapter(folder, names)
    safetensors = [name for name in names if NAMES.fullmatch(name)]
    indexes = [name for name in safetensors if name.endswith('.json')]
    if named := indexes or [name for name in safetensors if not _SHARD.fullmatch(name)]:
        raise UserError(f'{folder} holds {named[0]} instead of {SINGLE}: name the file itself, {folder / named[0]}.')
    if safetensors:
        raise UserError(f'{folder} holds {safetensors[0]} but no {INDEX}: copy the checkpoint again, with its index.')
    for pattern, reason in ((_PICKLES, 'a pickle, which is never opened'), (_OTHER_PROGRAMS, 'which cannot be read')):
        if refused := [name for name in names if pattern.fullmatch(name)]:
            raise UserError(
                f"{folder} holds {refused[0]}, {reason}: save the model again with transformers' save_pretrained, which writes "
                'safetensors.'
            )


def refuse_adapter(path: epath.Path, names: Sequence[str]) -> None:
    """Raises UserError, which names `path`, if one of the file names belongs to an adapter."""
    if any(name == _ADAPTER or name.startswith('adapter_model.') for name in names):
        raise UserError(
            f"{path} is an adapter and not a model: merge it into its model with peft's merge_and_unload, and save that with "
            'save_pretrained.'
        )


def which_file(folder: epath.Path, named: str | None, by_config: Any) -> epath.Path:
    """Returns the file of arrays or index to read, in the order of transformers' `_get_resolved_checkpoint_files`.

    Args:
      folder: of the model.
      named: the file that the user named; None if the user named the folder.
      by_config: `transformers_weights` of the configuration.
    """
    if named is not None and not _SHARD.fullmatch(named):
        return folder / named
    if by_config is not None:
        endings = ('.safetensors', '.safetensors.index.json')
        if not json_files.is_plain_name(by_config) or not by_config.endswith(endings):
            raise UserError(
                f'{folder / CONFIG}: transformers_weights is {schema.shown(by_config)}: it must name a safetensors file or '
                'its index.'
            )
        return folder / by_config
    if (folder / _ADAPTER).exists():
        warning.once(f'{folder / _ADAPTER} is ignored: the model is read without its adapter.')
    if not (folder / SINGLE).exists():
        return folder / INDEX
    if (folder / INDEX).exists() and indexed_files(folder / INDEX) != {SINGLE}:
        warning.once(
            f'{folder / INDEX} and its files are ignored: {SINGLE} is read, as in transformers. Name the index to read them.'
        )
    return folder / SINGLE
