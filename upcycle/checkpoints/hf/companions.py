"""Files that belong to a Hugging Face model besides weights and `config.json`: tokenizer, chat template, generation, licence.

They follow a model through our formats: a folder that we write has those of the folder that the model comes from, even if that
folder is gone by then. A step of ours that was imported or converted holds them in its item `metadata`, a run in its folder.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from upcycle import files, warning
from upcycle.checkpoints import json_files
from upcycle.errors import UserError

# The folder with copies, in a run's folder or in the item `metadata` of a step.
FOLDER = 'huggingface'
KEY = 'companions'  # of the metadata for a writer: the folder to copy from
_NAMES = (
    *(
        'generation_config.json',
        'tokenizer.json',
        'tokenizer_config.json',
        'special_tokens_map.json',
        'added_tokens.json',
    ),
    *('tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model', 'vocab.json', 'vocab.txt', 'merges.txt'),
    *('chat_template.jinja', 'chat_template.json', 'preprocessor_config.json', 'processor_config.json'),
    *('LICENSE*', 'LICENCE*', 'NOTICE*', 'USE_POLICY*'),
)
# Files that decide the ids of tokens.
_TOKENIZERS = ('tokenizer.json', 'tokenizer.model', 'spiece.model', 'vocab.txt', 'merges.txt', 'added_tokens.json')
_SETTINGS = 'generation_config.json'
_TEMPLATES = 'additional_chat_templates'
_CODE = '*.py'
_CODE_FIELD = 'auto_map'  # names classes in files of the folder


def names(folder: epath.Path) -> list[str]:
    """Returns the files of a folder that belong to its model, by their names in the folder."""
    found = [file.name for file in folder.iterdir() if any(fnmatch.fnmatchcase(file.name, name) for name in _NAMES)]
    templates = folder / _TEMPLATES
    inner = [f'{_TEMPLATES}/{file.name}' for file in (templates.iterdir() if templates.is_dir() else ())]
    return sorted(found) + sorted(name for name in inner if name.endswith('.jinja'))


def of(path: str, format: str) -> str | None:
    """Returns the folder that holds the companions of a checkpoint; None if there is none.

    Args:
      path: of the folder, of a step of ours, or of a GGUF file, whose companions are made.
      format: of the checkpoint.

    Raises:
      UserError: one of them is not a file, or is damaged; the tokenizer of a GGUF file is not known.
    """
    if format == 'gguf':
        from upcycle.checkpoints.gguf import reader

        return str(reader.unpacked(path))
    step = epath.Path(path)
    places = [step] if format == 'huggingface' else [step / 'metadata' / FOLDER, step.parent.parent / FOLDER]
    found = next((place for place in places if place.is_dir() and names(place)), None)
    if found is None:
        return None
    for name in names(found):
        files.require_file(found / name)
        if not (found / name).is_file():
            raise UserError(f'{found / name} is a dangling link: copy it again, or remove it.')
        if name == _SETTINGS:
            json_files.read_settings(found / name)
        elif name.endswith('.json'):
            json_files.read_json(found / name)
    return str(found)


def copy(source: str | None, target: epath.Path) -> None:
    """Copies companions into a folder, which is made if there are any. Says which code is not copied.

    Args:
      source: folder to copy from; None: nothing is copied.
      target: local folder, or one in a bucket.
    """
    if source is None:
        return
    folder = epath.Path(source)
    for name in names(folder):
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((folder / name).read_bytes())
    for line in _code(folder):
        warning.once(line)


def _code(folder: epath.Path) -> list[str]:
    """Returns a sentence about the code of a folder, if it has any."""
    code = sorted(file.name for file in folder.iterdir() if fnmatch.fnmatchcase(file.name, _CODE))
    code += [
        f'{name} ({_CODE_FIELD})' for name in ('config.json', 'tokenizer_config.json') if _names_code(folder / name)
    ]
    return [f'code of {folder} is not copied, since a model of ours needs none: {", ".join(code)}.'] if code else []


def _names_code(file: epath.Path) -> bool:
    try:
        content: Mapping[str, Any] = json_files.read_json(file) if file.exists() else {}
    except UserError:
        return False
    return bool(content.get(_CODE_FIELD))


def tokenizer_differences(one: str, other: str) -> list[str]:
    """Returns what differs between the tokenizers of two folders, such as 'model.vocab of tokenizer.json'.

    A file that only one of them has is not compared, and neither are lengths of padding.
    """
    differing = []
    for name in _TOKENIZERS:
        files = [epath.Path(folder) / name for folder in (one, other)]
        if not all(file.exists() for file in files):
            continue
        if name.endswith('.json'):
            first, second = ({f'{key} of {name}': value for key, value in _fields(file)} for file in files)
            differing += [key for key in first | second if first.get(key) != second.get(key)]
        elif files[0].read_bytes() != files[1].read_bytes():
            differing.append(name)
    return differing


def other_differences(one: str | None, other: str | None) -> list[str]:
    """Returns the settings, such as the chat template, that differ between two folders; None for no folder."""
    if one is None or other is None:
        return []
    both = {*names(epath.Path(one))} & {*names(epath.Path(other))}
    return [
        name
        for name in sorted(both - {*_TOKENIZERS})
        if name.endswith(('.json', '.jinja')) and _content(one, name) != _content(other, name)
    ]


def _content(folder: str, name: str) -> Any:
    file = epath.Path(folder) / name
    return json_files.read_json(file) if name.endswith('.json') else file.read_bytes()


def _fields(file: epath.Path) -> Iterator[tuple[str, Any]]:
    for key, value in json_files.read_json(file).items():
        if isinstance(value, dict) and key == 'model':
            yield from ((f'{key}.{inner}', content) for inner, content in value.items())
        elif key not in ('truncation', 'padding'):
            yield key, value
