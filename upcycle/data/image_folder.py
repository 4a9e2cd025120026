"""The user's own images, one folder per class."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from upcycle.data import corpus
from upcycle.data.photographs import Encoded, thread_pool
from upcycle.errors import UserError

_CLUTTER = {'thumbs.db', 'desktop.ini'}


class _File(NamedTuple):
    """A file: its name relative to the split's folder ('cat/1.jpg'), its size in bytes and its path."""

    name: str
    size: int
    path: str


class _Split(NamedTuple):
    files: list[_File]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images in one folder per class, at any depth, in any format that Pillow reads.

    Class ids follow the alphabetical order of the folder names.

    Attributes:
      train_folder: folder that contains one folder of training images per class [TRAIN_FOLDER].
      validation_folder: folder of validation images, with the same classes. None: hold out about 5% of the training images,
        chosen by the hashes of their names [VALIDATION_FOLDER].
    """

    train_folder: str | None
    validation_folder: str | None = None

    streamed = False
    encoded = True
    max_labels = 1

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(_read(self.train_folder, self.validation_folder)[0])

    def size(self, split: str) -> int:
        """Number of examples in a split.

        Raises:
          UserError: the split is unknown, or the folders are not usable.
        """
        return len(self._split(split).files)

    def read(self, split: str, places: np.ndarray) -> tuple[list[Encoded], np.ndarray]:
        """Reads the undecoded files and int32 labels [n, 1].

        Raises:
          UserError: a file cannot be read.
        """
        files, labels = self._split(split)
        return list(thread_pool().map(_read_file, [files[place] for place in places])), labels[places]

    def fingerprint(self, split: str) -> dict[str, str]:
        """The number of classes and the sha256 of the file names and sizes."""
        digest = hashlib.sha256()
        for name, size, _ in self._split(split).files:
            digest.update(f'{name}\0{size}\n'.encode(errors='surrogateescape'))
        return {'source': 'image_folder', 'num_classes': self.num_classes, 'files_sha256': digest.hexdigest()}

    def _split(self, split: str) -> _Split:
        splits = _read(self.train_folder, self.validation_folder)[1]
        if split not in splits:
            raise UserError(
                f"A folder of images has no split {split!r}: set DatasetConfig.split to 'train' or 'validation'."
            )
        if not splits[split].files:
            raise UserError(f'{self.train_folder} has too few images for a validation split: set VALIDATION_FOLDER.')
        return splits[split]


@functools.cache
def _read(train_folder: str | None, validation_folder: str | None) -> tuple[list[str], dict[str, _Split]]:
    """The class names and the splits."""
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
            has, lacks = (train_folder, validation_folder) if name in files else (validation_folder, train_folder)
            raise UserError(f'{os.path.join(has, name)} is a class that {lacks} lacks: both need the same classes.')
        parts['validation'] = [file for name in classes for file in other[name]]
    number = {name: i for i, name in enumerate(classes)}
    return classes, {
        split: _Split(listed, np.array([[number[file.name.split('/')[0]]] for file in listed], np.int32).reshape(-1, 1))
        for split, listed in parts.items()
    }


def _list(folder: str | None, binding: str) -> dict[str, list[_File]]:
    """Returns the files of each class, sorted by name. There is at least one class, and each has at least one file."""
    if not folder:
        raise UserError(f'{binding} is not set: set it to a folder that contains one folder of images per class.')
    if '://' in folder:
        raise UserError(
            f'{binding} = {folder!r} is not a local folder: mount it, or prepare its images as a TFDS dataset.'
        )
    if not os.path.isdir(folder):
        raise UserError(f'{binding} = {folder!r} is not a folder: set it to one that contains one folder per class.')
    classes = {}
    for entry in _entries(folder):
        if not entry.is_dir():
            raise UserError(f'{entry.path} is not in a class folder: move it into one, or out of {binding}.')
        classes[entry.name] = sorted(_files_below(entry.path, entry.name))
        if not classes[entry.name]:
            raise UserError(f'{entry.path} contains no images: add some, or remove the folder.')
    if not classes:
        raise UserError(f'{binding} = {folder!r} contains no folders: it needs one per class.')
    return classes


def _files_below(folder: str, name: str) -> list[_File]:
    """Lists the images in a class folder, at any depth."""
    files = []
    for entry in _entries(folder):
        entry_name = f'{name}/{entry.name}'
        if entry.is_dir():
            files += _files_below(entry.path, entry_name)
        elif os.path.splitext(entry.name)[1].lower() not in _extensions():
            raise UserError(f'{entry.path} does not have an image extension: remove it, or rename it by its format.')
        else:
            with _reading(entry.path):
                files.append(_File(entry_name, entry.stat().st_size, entry.path))
    return files


def _entries(folder: str) -> list[os.DirEntry]:
    """The entries of a folder, without hidden files and those of file managers."""
    with _reading(folder), os.scandir(folder) as entries:
        return [e for e in entries if not e.name.startswith('.') and e.name.lower() not in _CLUTTER]


@functools.cache
def _extensions() -> set[str]:
    """The file extensions of the formats that Pillow reads."""
    return {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _read_file(file: _File) -> Encoded:
    with _reading(file.path), open(file.path, 'rb') as opened:
        return Encoded(file.path, opened.read())


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turns an OSError into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f'{path} cannot be read ({error.strerror}): repair it or its permissions, or remove it.'
        ) from None
