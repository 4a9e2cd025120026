"""The user's own images, one folder a class, as they are."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from typing import NamedTuple

import numpy as np

from upcycle.data import corpus
from upcycle.data.photographs import Encoded, thread_pool
from upcycle.errors import UserError

_CLUTTER = {'thumbs.db', 'desktop.ini'}


class _File(NamedTuple):
    """A file: its name relative to the split's folder ('cat/1.jpg'), its size in bytes, and its path."""

    name: str
    size: int
    path: str


class _Split(NamedTuple):
    files: list[_File]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images in folders named after their classes, at any depth below, in any format that Pillow reads.

    Class ids are the places of the folders' names in alphabetical order.

    train_folder: holds a folder of images for each class [TRAIN_FOLDER].
    validation_folder: the same for validation, of the same classes; where None, about 5% of the train images, chosen by the
        hashes of their names [VALIDATION_FOLDER].
    """

    train_folder: str | None
    validation_folder: str | None = None

    streamed = False
    encoded = True
    max_labels = 1

    @property
    def num_classes(self) -> int:
        """Folders of classes."""
        return len(_read(self.train_folder, self.validation_folder)[0])

    def size(self, split: str) -> int:
        """Examples in a split.

        Raises:
            UserError: if there is no such split, or the folders are not as they should be.
        """
        return len(self._split(split).files)

    def read(self, split: str, places: np.ndarray) -> tuple[list[Encoded], np.ndarray]:
        """The files, undecoded, and int32 labels [n, 1].

        Raises:
            UserError: naming a file that cannot be read.
        """
        files, labels = self._split(split)
        return list(thread_pool().map(_read_file, [files[place] for place in places])), labels[places]

    def fingerprint(self, split: str) -> dict[str, str]:
        """The classes' number, and the sha256 of the files' names and sizes."""
        digest = hashlib.sha256()
        for name, size, _ in self._split(split).files:
            digest.update(f'{name}\0{size}\n'.encode(errors='surrogateescape'))
        return {'source': 'image_folder', 'num_classes': self.num_classes, 'files_sha256': digest.hexdigest()}

    def _split(self, split: str) -> _Split:
        splits = _read(self.train_folder, self.validation_folder)[1]
        if split not in splits:
            raise UserError(
                f"A folder of images has no split {split!r}: bind DatasetConfig.split to 'train' or 'validation'."
            )
        if not splits[split].files:
            raise UserError(f'{self.train_folder} holds too few images to hold some out: bind VALIDATION_FOLDER.')
        return splits[split]


@functools.cache
def _read(train_folder: str | None, validation_folder: str | None) -> tuple[list[str], dict[str, _Split]]:
    """Names of the classes, and the splits."""
    files = _list(train_folder, 'TRAIN_FOLDER')
    classes = sorted(files)
    parts = {'train': [file for name in classes for file in files[name]]}
    if validation_folder is None:
        split_of = corpus.split_by_hash(file.name for file in parts['train'])
        parts = {
            split: [file for file in parts['train'] if split_of[file.name] == split]
            for split in ('train', 'validation')
        }
    else:
        other = _list(validation_folder, 'VALIDATION_FOLDER')
        for name in sorted(files.keys() ^ other.keys()):
            there, lacking = (train_folder, validation_folder) if name in files else (validation_folder, train_folder)
            raise UserError(f'{os.path.join(there, name)} is a class that {lacking} lacks: both need the same classes.')
        parts['validation'] = [file for name in classes for file in other[name]]
    number = {name: i for i, name in enumerate(classes)}
    return classes, {
        split: _Split(listed, np.array([[number[file.name.split('/')[0]]] for file in listed], np.int32).reshape(-1, 1))
        for split, listed in parts.items()
    }


def _list(folder: str | None, binding: str) -> dict[str, list[_File]]:
    """The files of each class, sorted by name; at least one class, each of at least one file."""
    if not folder:
        raise UserError(f'{binding} is not bound: bind it to a folder that holds a folder of images for each class.')
    if '://' in folder:
        raise UserError(
            f'{binding} = {folder!r} is not a local folder: mount it, or prepare its images as a TFDS data set.'
        )
    if not os.path.isdir(folder):
        raise UserError(f'{binding} = {folder!r} is not a folder: bind it to one that holds a folder for each class.')
    classes = {}
    for entry in _entries(folder):
        if not entry.is_dir():
            raise UserError(f'{entry.path} lies in no folder of a class: move it into one, or out of {binding}.')
        classes[entry.name] = sorted(_files_below(entry.path, entry.name))
        if not classes[entry.name]:
            raise UserError(f'{entry.path} holds no image: remove the folder, or fill it.')
    if not classes:
        raise UserError(f'{binding} = {folder!r} holds no folder: it needs one for each class.')
    return classes


def _files_below(folder: str, name: str) -> list[_File]:
    """The images in a class's folder, at any depth."""
    found = []
    for entry in _entries(folder):
        entry_name = f'{name}/{entry.name}'
        if entry.is_dir():
            found += _files_below(entry.path, entry_name)
        elif os.path.splitext(entry.name)[1].lower() not in _endings():
            raise UserError(f'{entry.path} is no image by its ending: take it out, or name it by its format.')
        else:
            try:
                found.append(_File(entry_name, entry.stat().st_size, entry.path))
            except OSError as error:
                raise UserError(f'{entry.path} cannot be read ({error.strerror}): repair it, or take it out.') from None
    return found


def _entries(folder: str) -> list[os.DirEntry]:
    """What is in a folder, without what file managers leave there."""
    try:
        with os.scandir(folder) as entries:
            return [e for e in entries if not e.name.startswith('.') and e.name.lower() not in _CLUTTER]
    except OSError as error:
        raise UserError(
            f'{folder} cannot be read ({error.strerror}): correct its permissions, or take it out.'
        ) from None


@functools.cache
def _endings() -> set[str]:
    """Those of the formats that Pillow reads."""
    from PIL import Image

    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _read_file(file: _File) -> Encoded:
    try:
        with open(file.path, 'rb') as opened:
            return Encoded(file.path, opened.read())
    except OSError as error:
        raise UserError(f'{file.path} cannot be read ({error.strerror}): repair it, or take it out.') from None
