"""Which files of a Hugging Face folder count, in the order of transformers, and what other folders hold instead."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from etils import epath

from upcycle import schema, warning
from upcycle.checkpoints import json_files
from upcycle.checkpoints.hf.sources import CONFIG
from upcycle.checkpoints.safetensors import INDEX, SINGLE, indexed_files
from upcycle.errors import UserError

# What a file of some other kind is, by its name.
_ADAPTER = 'adapter_config.json'
_ADAPTER_FILES = 'adapter_model.'
_PICKLES = re.compile(r'pytorch_model.*\.bin(\.index\.json)?|.*\.(pt|pth|ckpt|pkl)')
_OTHER_PROGRAMS = re.compile(
    r'(tf_model.*\.h5|flax_model.*\.msgpack|.*\.gguf|model.*\.onnx|.*\.ckpt-\d+\.index'
    r'|global_step\d+|zero_to_fp32\.py|pytorch_model_fsdp_\d+|.*\.distcp)'  # DeepSpeed, FSDP
)
NAMES = re.compile(r'.*\.safetensors(\.index(\.\w+)?\.json)?')  # arrays, or an index, which may be of a variant
_SHARD = re.compile(r'.*-\d{5}-of-\d{5}\.safetensors')


def find(folder: epath.Path) -> bool:
    """Whether a folder holds safetensors."""
    return any((folder / name).exists() for name in (SINGLE, INDEX))


def refuse_other_files(folder: epath.Path) -> None:
    """Says what a folder without `model.safetensors` and its index holds instead, or what another file is.

    Raises:
        UserError: an adapter, files of another name, or of another program.
    """
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else [folder.name]
    folder = folder if folder.is_dir() else folder.parent
    if links := [name for name in (SINGLE, INDEX) if name in names and not (folder / name).exists()]:
        raise UserError(
            f'{folder / links[0]} is a link to a file that is not there: copy the checkpoint again, with what its links lead to.'
        )
    if any(name == _ADAPTER or name.startswith(_ADAPTER_FILES) for name in names):
        _refuse_adapter(folder)
    safetensors = [name for name in names if NAMES.fullmatch(name)]
    indexes = [name for name in safetensors if name.endswith('.json')]
    if found := indexes or [name for name in safetensors if not _SHARD.fullmatch(name)]:
        raise UserError(f'{folder} holds {found[0]} and no {SINGLE}: name the file itself, {folder / found[0]}.')
    if safetensors:
        raise UserError(f'{folder} holds {safetensors[0]} and no {INDEX}: copy the checkpoint again, with its index.')
    if pickles := [name for name in names if _PICKLES.fullmatch(name)]:
        raise UserError(
            f'{folder} holds {pickles[0]}, a pickle, which is never opened: save the model again with '
            "transformers' save_pretrained, which writes safetensors."
        )
    if others := [name for name in names if _OTHER_PROGRAMS.fullmatch(name)]:
        raise UserError(
            f'{folder} holds {others[0]}, which is not read: save the model again with '
            "transformers' save_pretrained, which writes safetensors."
        )


def refuse_adapter_file(path: epath.Path) -> None:
    """Raises UserError where a file is an adapter's."""
    if path.name.startswith(_ADAPTER_FILES):
        _refuse_adapter(path)


def _refuse_adapter(path: epath.Path) -> NoReturn:
    raise UserError(
        f"{path} is an adapter and no model: merge it into its model with peft's merge_and_unload, and save that with "
        'save_pretrained.'
    )


def which_file(folder: epath.Path, named: str | None, by_config: Any) -> epath.Path:
    """The file that counts, of arrays or an index, in the order of transformers' `_get_resolved_checkpoint_files`.

    Args:
        folder: of the model.
        named: the file that the user named; None: the folder.
        by_config: `transformers_weights` of the configuration.
    """
    if named is not None and not _SHARD.fullmatch(named):
        return folder / named
    if by_config is not None:
        if not json_files.is_plain_name(by_config) or not by_config.endswith(
            ('.safetensors', '.safetensors.index.json')
        ):
            raise UserError(
                f'{folder / CONFIG}: transformers_weights is {schema.shown(by_config)}, where the name of a safetensors file or '
                'its index belongs.'
            )
        return folder / by_config
    if (folder / _ADAPTER).exists():
        warning.once(f'{folder / _ADAPTER} is passed over: the model is read without its adapter.')
    if not (folder / SINGLE).exists():
        return folder / INDEX
    if (folder / INDEX).exists() and indexed_files(folder / INDEX) != {SINGLE}:
        warning.once(
            f'{folder / INDEX} and its files are passed over: {SINGLE} counts, as in transformers. Name the index to read them.'
        )
    return folder / SINGLE
