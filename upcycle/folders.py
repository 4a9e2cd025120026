"""Folders that are easily taken for one another: those of models and those of token shards."""

import os
import pathlib

TOKENS = 'upcycle tokens'  # the format in the index of a folder of token shards
_INDEX = 'index.json'
_OF_A_MODEL = ('model.safetensors', 'model.safetensors.index.json', 'config.gin')
_HEAD = 200  # bytes of an index that hold its format


def holds_tokens(path: str | os.PathLike[str]) -> bool:
    """Returns whether a local folder is one that `upcycle tokenize` has written."""
    try:
        with (pathlib.Path(path) / _INDEX).open('rb') as file:
            return f'"{TOKENS}"'.encode() in file.read(_HEAD)
    except OSError:
        return False


def part_of_a_model(path: str | os.PathLike[str]) -> str | None:
    """Returns the name of a file by which a local folder is that of a model or of a run; None if it is neither."""
    return next((name for name in _OF_A_MODEL if (pathlib.Path(path) / name).exists()), None)
