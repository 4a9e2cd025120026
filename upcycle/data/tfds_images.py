"""A source of labelled images from any TFDS dataset that is already prepared. Nothing is downloaded.

Files in a random-access format (array_record) are read by index. TFRecord files can only be read in order, so they are
streamed and shuffled through a buffer.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from upcycle.data import JSON, tensorflow_quiet
from upcycle.data.photographs import Encoded
from upcycle.errors import MissingData, UserError
from upcycle.schema import Count


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """Labelled images of a TFDS dataset. Splits are TFDS's: 'train', 'train[:99%]', 'validation', ...

    Attributes:
      name: name in TFDS, optionally with configuration and version: 'imagenet2012:5.1.0' [TFDS_NAME].
      data_dir: folder of the prepared data. None: the environment variable TFDS_DATA_DIR, or TFDS's default [TFDS_DATA_DIR].
      image_feature: name of the image feature.
      label_feature: name of the feature with a class or a sequence of classes.
      max_labels: largest number of classes per image.
      shuffle_buffer: number of undecoded images in the shuffle buffer, for streamed files.
    """

    name: str
    data_dir: str | None = None
    image_feature: str = 'image'
    label_feature: str = 'label'
    max_labels: Count = 1
    shuffle_buffer: Count = 10_000

    encoded = True
    # See `gin_data.HARMLESS`. A name with a namespace ('huggingface:...', 'kaggle:...') makes TFDS download and run code.
    harmless = MappingProxyType({'name': re.compile(r'\w+(/[\w.+-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?')})

    @property
    def num_classes(self) -> int:
        """Number of classes of the label feature."""
        feature = self._features[self.label_feature]
        number = getattr(getattr(feature, 'feature', feature), 'num_classes', None)
        if number is None:
            raise UserError(
                f'label_feature = {self.label_feature!r} of {self.name} is not a class label: set it to another of '
                f'{", ".join(self._features)}.'
            )
        return number

    @property
    def streamed(self) -> bool:
        """True if the files can only be read in order."""
        random_access = tensorflow_quiet.tfds().core.FileFormat.with_random_access()
        return not self._builder.info.available_file_formats() & random_access

    def size(self, split: str) -> int:
        """Number of examples in a split.

        Raises:
          UserError: the split is unknown, or the dataset is not prepared.
        """
        return self._split(split).num_examples

    def read(self, split: str, places: np.ndarray) -> tuple[list[Encoded], np.ndarray]:
        """Reads the undecoded images and int32 labels [n, max_labels].

        Raises:
          UserError: a file is missing or damaged.
        """
        with tensorflow_quiet.reading(self.name):
            try:
                examples = _data_source(self, split).__getitems__(places.tolist())
            except (RuntimeError, ValueError, TypeError) as error:  # a missing, truncated or damaged file
                raise UserError(
                    f'{self.name}, {split}, cannot be read ({_one_line(error)}): a file in {_folder(self.data_dir)} is missing '
                    'or damaged; prepare the dataset again.'
                ) from error
        names = [f'{self.name}, {split}, example {place}' for place in places]
        return self._undecoded(names, examples)

    def stream(
        self,
        split: str,
        rows: int,
        start: int,
        *,
        shuffle: bool,
        seed: int,
        repeat: bool,
        index: int,
        count: int,
    ) -> Iterator[tuple[list[Encoded], np.ndarray]]:
        """Yields the share of reader `index` of `count`, `rows` examples at a time, from its batch `start` on."""
        tfds = tensorflow_quiet.tfds()
        self.size(split)
        config = tfds.ReadConfig(shuffle_seed=seed, try_autocache=False, add_tfds_id=True)
        # Otherwise TFDS reads shuffled files in the order in which they arrive.
        config.options.deterministic = True
        share = tfds.even_splits(split, count)[index]
        if not self._split(share).num_examples:
            if repeat:
                raise UserError(
                    f'{self.name}, {split}, has no examples for reader {index} of {count} (hosts that read different rows): use '
                    'fewer hosts.'
                )
            return
        with tensorflow_quiet.reading(self.name):
            dataset = self._builder.as_dataset(
                split=share, shuffle_files=shuffle, read_config=config, decoders=self._decoders
            )
        if shuffle:
            dataset = dataset.shuffle(self.shuffle_buffer, seed=seed)
        if repeat:
            dataset = dataset.repeat()
        # Skipped examples are read but not decoded.
        iterator = dataset.skip(start * rows).prefetch(rows).as_numpy_iterator()
        while True:
            with tensorflow_quiet.reading(self.name):
                examples = list(itertools.islice(iterator, rows))
            if not examples:
                return
            yield self._undecoded([f'{self.name}, {example["tfds_id"].decode()}' for example in examples], examples)

    def fingerprint(self, split: str) -> dict[str, JSON]:
        """Name and version, classes, and the sha256 of the shard lengths and bytes of the split."""
        info = self._builder.info
        part = self._split(split)
        whole = info.splits[split.split('[')[0]]
        shards = hashlib.sha256(f'{list(whole.shard_lengths)} {whole.num_bytes}'.encode()).hexdigest()
        identity: dict[str, JSON] = {
            'source': info.full_name,
            'num_examples': part.num_examples,
            'num_classes': self.num_classes,
            'shards_sha256': shards,
            'streamed': self.streamed,
            'image_feature': self.image_feature,
            'label_feature': self.label_feature,
            'max_labels': self.max_labels,
        }
        return identity | ({'shuffle_buffer': self.shuffle_buffer} if self.streamed else {})

    @property
    def _builder(self) -> Any:
        return _builder(self.name, self.data_dir)

    @property
    def _features(self) -> Any:
        features = self._builder.info.features
        for binding in ('image_feature', 'label_feature'):
            if getattr(self, binding) not in features:
                raise UserError(
                    f'{binding} = {getattr(self, binding)!r} is not a feature of {self.name}: set it to one of '
                    f'{", ".join(features)}.'
                )
        return features

    @property
    def _decoders(self) -> dict[str, Any]:
        return {self.image_feature: tensorflow_quiet.tfds().decode.SkipDecoding()}

    def _split(self, split: str) -> Any:
        splits = self._builder.info.splits
        try:
            return splits[split]
        except (KeyError, ValueError, AssertionError):
            raise UserError(
                f'{self.name} has no split {split!r}: set it to one of {", ".join(splits)}, or a part such as '
                f"'{next(iter(splits))}[:99%]'."
            ) from None

    def _undecoded(
        self, names: Sequence[str], examples: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Encoded], np.ndarray]:
        """Images, and labels padded with -1, of examples with one label or a sequence of labels."""
        images = [Encoded(name, example[self.image_feature]) for name, example in zip(names, examples, strict=True)]
        padded = np.full((len(names), self.max_labels), -1, np.int32)
        for name, row, example in zip(names, padded, examples, strict=True):
            labels = np.atleast_1d(example[self.label_feature])
            if len(labels) > self.max_labels:
                raise UserError(f'{name} has {len(labels)} labels and MAX_LABELS = {self.max_labels}: raise it.')
            row[: len(labels)] = labels
        return images, padded


@functools.cache
def _builder(name: str, data_dir: str | None) -> Any:
    """Loads the builder of a prepared dataset.

    Raises:
      MissingData: the name is unknown to TFDS, or the dataset is not prepared.
      UserError: it cannot be loaded.
    """
    tfds = tensorflow_quiet.tfds()
    bare = name.split(':')[0].split('/')[0]
    try:
        with tensorflow_quiet.reading(name):
            builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        close = difflib.get_close_matches(bare, tfds.list_builders(with_community_datasets=False))
        raise MissingData(
            f'TFDS_NAME = {name!r} is neither known to TFDS (close: {", ".join(close) or "none is similar"}) nor prepared in '
            f'{_folder(data_dir)}: correct the name, or set TFDS_DATA_DIR to the folder of the prepared data.'
        ) from None
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f'TFDS_NAME = {name!r} cannot be loaded ({_one_line(error)}): correct the name.') from None
    if not builder.info.splits:
        raise MissingData(
            f'{builder.info.full_name} is not prepared in {_folder(data_dir)}: run `tfds build {bare} '
            f'--file_format=array_record --data_dir={_folder(data_dir)}` first, or set TFDS_DATA_DIR to its folder.'
        )
    return builder


def _folder(data_dir: str | None) -> str:
    return data_dir or str(tensorflow_quiet.tfds().core.constants.DATA_DIR)


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())


@functools.cache
def _data_source(images: TfdsImages, split: str) -> Any:
    return images._builder.as_data_source(split, decoders=images._decoders)
