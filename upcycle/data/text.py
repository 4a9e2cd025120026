"""A `DataSource` of any seqio task or mixture, with the names of T5X's gin files.

Our tasks (`embedded.py`, `text_files.py`) are random access: global batch b is a pure function of (seed, b), for any number of
hosts and any start. Other seqio tasks are streams, and resuming replays them up to the position.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle.data import JSON, WHOLE, Share, require_lengths, tensorflow_quiet
from upcycle.data.sentinels import TRAINED_WITH, counted_down
from upcycle.data.text_files import TextFiles
from upcycle.errors import MissingData, UserError
from upcycle.schema import Count, Whole

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

    from upcycle.data import span_corruption
    from upcycle.data.random_access import RandomAccessSource

__all__ = ['DatasetConfig', 'TextFiles']


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A `DataSource` of batches of a seqio task or mixture for an encoder-decoder.

    Attributes:
      mixture_or_task_name: name in seqio's registry [MIXTURE_OR_TASK_NAME].
      task_feature_lengths: tokens of 'inputs' and 'targets' per row [TASK_FEATURE_LENGTHS].
      split: name of the split: 'train', 'validation', ...
      batch_size: rows of a global batch.
      seed: seed of shuffling and corruption.
      pack: pack several examples per row, with segment ids and positions, as T5X does.
      shuffle: shuffle the examples; set to False for validation in corpus order.
      use_cached: read the output of `seqio_cache_tasks`; only for seqio tasks of other packages, such as C4.
      module: module that registers the task; it is imported first.
      num_batches: maximum number of batches, for a bounded evaluation.
      repeat: True: endless. False: one pass, whose last batch is padded with rows of zeros.
      source: files of `text_files_span_corruption`. None: look the task up in seqio's registry.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, Count]
    split: str
    batch_size: Count
    seed: Whole = 0
    pack: bool = True
    shuffle: bool = True
    use_cached: bool = False
    module: str | None = None
    num_batches: Count | None = None
    repeat: bool = True
    source: TextFiles | None = None

    harmless = MappingProxyType({'module': re.compile(r'(upcycle|t5|seqio)(\.\w+)*')})  # see `gin_data.HARMLESS`

    def __post_init__(self):
        require_lengths(self.task_feature_lengths)

    @functools.cached_property
    def task(self) -> seqio.Task | seqio.Mixture:
        """The seqio task or mixture.

        Raises:
          MissingData: its module cannot be imported.
          UserError: the task is unknown or does not fit.
        """
        if self.source is not None:
            return self.source.task()
        seqio = tensorflow_quiet.seqio()
        if self.module:
            try:
                importlib.import_module(self.module)
            except ImportError as error:
                hint = 'pip install upcycle[t5]' if self.module.split('.')[0] == 't5' else 'install it'
                raise MissingData(
                    f'MIXTURE_OR_TASK_MODULE = {self.module!r} cannot be imported ({error}): {hint}, or name another.'
                ) from error
            except (Exception, SystemExit) as error:
                raise UserError(
                    f'MIXTURE_OR_TASK_MODULE = {self.module!r} cannot be imported '
                    f'({tensorflow_quiet.reason(error)}): correct the module, or name another.'
                ) from error
        name = self.mixture_or_task_name
        known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
        if name not in known:
            close = ', '.join(difflib.get_close_matches(name, known)) or 'none is similar'
            raise UserError(
                f'MIXTURE_OR_TASK_NAME = {name!r} is not registered with seqio (close: {close}): correct the name, or '
                'set MIXTURE_OR_TASK_MODULE to the module that registers it.'
            )
        with self.reading():
            task = seqio.get_mixture_or_task(name)
            features = task.output_features
        if missing := [feature for feature in ('inputs', 'targets') if feature not in features]:
            raise UserError(
                f'MIXTURE_OR_TASK_NAME = {name!r} has the features {", ".join(sorted(features)) or "none"}, and not '
                f'{" or ".join(missing)}, which an encoder-decoder needs: correct its output_features, or name another task.'
            )
        return task

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turns errors of seqio or the task into a UserError, unless the task is ours."""
        with tensorflow_quiet.reading(self.mixture_or_task_name):
            try:
                yield
            except (UserError, tensorflow_quiet.tensorflow().errors.OpError):
                raise
            except Exception as error:
                if self.source is not None or ('task' in self.__dict__ and self._random_access is not None):
                    raise
                raise UserError(
                    f'MIXTURE_OR_TASK_NAME = {self.mixture_or_task_name!r} cannot be read with USE_CACHED_TASKS = '
                    f'{self.use_cached} and split {self.split!r} ({tensorflow_quiet.reason(error)}): correct the task or these '
                    'bindings, or name another task.'
                ) from error

    @property
    def vocabulary(self) -> seqio.Vocabulary:
        """The vocabulary of the targets."""
        return self.task.output_features['targets'].vocabulary

    @property
    def vocabulary_size(self) -> int:
        """Number of ids in inputs and targets, sentinels included: the minimum size of the embedding."""
        with self.reading():
            sizes = [feature.vocabulary.vocab_size for feature in self.task.output_features.values()]
        source = self._random_access
        return max(sizes) if source is None else max(*sizes, *(sentinel + 1 for sentinel in source.sentinels), 0)

    def check_lengths(self) -> None:
        """Checks the lengths of a task of ours without reading data; seqio checks those of its tasks.

        Raises:
          UserError: the targets would be truncated, or there are fewer sentinels than spans.
        """
        if self._random_access is not None:
            self._lengths()

    def bound_sentinels(self) -> list[int] | None:
        """The first two sentinels if SENTINELS is set, or None."""
        bound = self.source is not None and self.source.sentinels is not None
        return list(self._random_access.sentinels[:2]) if bound else None

    def check_sentinels(self, path: str, known: str | Sequence[int] | None) -> None:
        """Checks that a task of ours uses the sentinels of a checkpoint, unless SENTINELS is set.

        Args:
          path: path of the checkpoint, for the message.
          known: its sentinels: a name that SENTINELS accepts, or the first two; None: unknown.

        Raises:
          UserError: the task uses other sentinels.
        """
        source, names = self._random_access, {ids: name for name, ids in TRAINED_WITH.items()}
        ids = TRAINED_WITH.get(known) if known is None or isinstance(known, str) else tuple(known)
        if source is None or self.bound_sentinels() or ids is None or source.sentinels[:2] == ids:
            return
        first = ', '.join(map(str, ids))
        binding = repr(names[ids]) if ids in names else f'({first}, ...)'
        raise UserError(
            f'{path} was trained with the sentinels {first}, ..., and {self.mixture_or_task_name} uses '
            f'{", ".join(map(str, source.sentinels[:2]))}, ...: set SENTINELS = {binding} with '
            'tasks/text_files_span_corruption.gin.'
        )

    def token_text(self, token: int) -> str:
        """Formats a token for display: its piece or byte, or `<ID>` for sentinels and special ids."""
        if hasattr(self.vocabulary, 'sp_model') and token < self.vocabulary.vocab_size:
            return self.vocabulary.tokenizer.id_to_piece(token)
        return self.vocabulary.decode([token]) or f'<{token}>'

    @property
    def streamed(self) -> bool:
        """Whether batches before a position must be read to reach it."""
        return self._random_access is None

    def batch_spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes [B, L] of a global batch, by T5X's feature names."""
        lengths = {'encoder': self.task_feature_lengths['inputs'], 'decoder': self.task_feature_lengths['targets']}
        names = ['encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights']
        if self.pack:
            names += [f'{stack}_{name}' for stack in lengths for name in ('segment_ids', 'positions')]
        return {
            name: (
                (self.batch_size, lengths[name.split('_')[0]]),
                np.dtype(np.float32 if name.endswith('weights') else np.int32),
            )
            for name in names
        }

    def fingerprint(self) -> dict[str, JSON]:
        """The identity of the data; for random-access tasks with the sha256 of the corpus and of the first examples."""
        identity: dict[str, JSON] = {
            'mixture_or_task_name': self.mixture_or_task_name,
            'task_feature_lengths': {name: int(n) for name, n in sorted(self.task_feature_lengths.items())},
        }
        with self.reading():
            identity['vocabulary'] = _vocabulary_identity(self.vocabulary, self._random_access)
        for name in ('split', 'batch_size', 'seed', 'pack', 'shuffle', 'use_cached', 'repeat'):
            identity[name] = getattr(self, name)
        if self._random_access is not None:
            identity['corpus_sha256'] = self._random_access.corpus.sha256
            identity['first_examples_sha256'] = self._first_examples_sha256
        return identity

    def promise(self) -> str:
        """Which determinism holds."""
        if self._random_access is not None:
            return (
                f'Global batch b of {self.mixture_or_task_name} is a pure function of (seed {self.seed}, b), for any number '
                'of hosts and any start.'
            )
        return (
            f'{self.mixture_or_task_name} is streamed by seqio with seed {self.seed}: the order is the same for the '
            'same number of readers (hosts that read different rows), files and versions of seqio and TensorFlow; a run '
            'reads it from its beginning, in an order of its first step, and a resumed run replays it up to its position.'
        )

    def batches(self, start: int = 0, share: Share = WHOLE) -> Iterator[dict[str, np.ndarray]]:
        """Yields a reader's rows of global batches `start`, `start + 1`, ...; see `DataSource.batches`.

        Raises:
          UserError: the batch size is not divisible by the parts, or the data cannot be read.
        """
        rows = sum(map(len, share.rows(self.batch_size)))
        stop = self._number_of_batches()
        if stop is None and not self.repeat and share.count > 1:
            raise UserError(
                f'{self.mixture_or_task_name} is streamed, so {share.count} hosts cannot agree on the end of its split '
                f'{self.split!r}: set EVAL_STEPS to a number.'
            )
        batches = self._pipeline(start, share).as_numpy_iterator()
        if self._random_access is not None:
            batches = map(self._features, batches)
        # A single host stops at the end of its stream; several must stop together.
        return self._padded(batches, rows, start, stop, may_end=stop is None or share.count == 1)

    @property
    def _random_access(self) -> RandomAccessSource | None:
        from upcycle.data.random_access import RandomAccessSource

        source = getattr(self.task, 'source', None)
        return source if isinstance(source, RandomAccessSource) else None

    @functools.cached_property
    def _first_examples_sha256(self) -> str:
        """Detects anything that changes the batches, such as random numbers of another TensorFlow version."""
        digest = hashlib.sha256()
        for examples in self._examples(0, [0]).batch(1).take(8).as_numpy_iterator():
            features = self._features(examples)
            for name in sorted(features):
                digest.update(np.ascontiguousarray(features[name], '<i4').tobytes())
        return digest.hexdigest()

    def _number_of_batches(self) -> int | None:
        """The number of batches, or None if unknown or endless."""
        if self._random_access is None or self.repeat:
            return self.num_batches
        whole = -(-self._chunks_per_epoch() // self.batch_size)
        return whole if self.num_batches is None else min(whole, self.num_batches)

    def _chunks_per_epoch(self) -> int:
        from upcycle.data import random_access

        return random_access.check_split(self._random_access, self.split, self._lengths(), self.shuffle)

    def _lengths(self) -> span_corruption.Lengths:
        from upcycle.data import span_corruption

        return span_corruption.checked_lengths(self.task_feature_lengths, self._random_access.sentinels)

    @functools.cached_property
    def _pipeline(self) -> Callable[[int, Share], tf.data.Dataset]:
        # Tracing a pipeline takes about a second, and every evaluation starts the same one.
        return functools.cache(self._build_pipeline)

    def _build_pipeline(self, start: int, share: Share) -> tf.data.Dataset:
        tf = tensorflow_quiet.tensorflow()
        rows = [*itertools.chain.from_iterable(share.rows(self.batch_size))]
        if self._random_access is None:
            with self.reading():
                dataset = self._stream(share).batch(len(rows)).skip(start)
        else:
            dataset = self._examples(start * self.batch_size, rows).batch(len(rows))
        options = tf.data.Options()
        options.deterministic = True
        return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)

    def _examples(self, first: int, rows: Sequence[int]) -> tf.data.Dataset:
        """Random-access examples, `rows` of each batch from example `first` on: 'inputs' and 'targets' with EOS."""
        self._chunks_per_epoch()
        request = self._random_access.request(
            self.split,
            shuffle=self.shuffle,
            seed=self.seed,
            first=first,
            rows=rows,
            stride=self.batch_size,
            endless=self.repeat,
        )
        return self.task.preprocess_postcache(request, sequence_length=self.task_feature_lengths)

    def _features(self, examples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts examples as `seqio.EncDecFeatureConverter(pack=False)` does, which would take a third of the time.

        An example fills its row, so packing only adds `segment_ids` and `positions`.
        """
        inputs, targets = (
            np.pad(examples[name], ((0, 0), (0, self.task_feature_lengths[name] - examples[name].shape[1])))
            for name in ('inputs', 'targets')
        )
        return {
            'encoder_input_tokens': inputs,
            'decoder_target_tokens': targets,
            'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
            'decoder_loss_weights': (targets != 0).astype(np.int32),
        }

    def _stream(self, share: Share) -> tf.data.Dataset:
        """The rows of one reader of any other seqio task or mixture, from the beginning."""
        seqio = tensorflow_quiet.seqio()
        return seqio.get_dataset(
            self.task,
            dict(self.task_feature_lengths),
            seqio.EncDecFeatureConverter(pack=self.pack),
            dataset_split=self.split,
            use_cached=self.use_cached,
            shuffle=self.shuffle,
            num_epochs=None if self.repeat else 1,
            shard_info=seqio.ShardInfo(index=share.index, num_shards=share.count),
            verbose=False,
            seed=self.seed,
        )

    def _padded(
        self, batches: Iterator[dict[str, np.ndarray]], rows: int, start: int, stop: int | None, may_end: bool
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields batches `start` to `stop` with all features and rows, padded with zeros."""
        spec = self.batch_spec()
        number = start
        while stop is None or number < stop:
            with self.reading():
                batch = next(batches, None)
            if batch is None and may_end:
                return
            batch = batch or {}
            if self.pack and batch and 'encoder_segment_ids' not in batch:
                batch |= _packed_alone(batch)
            padded = {name: np.zeros((rows, *shape[1:]), dtype) for name, (shape, dtype) in spec.items()}
            for name, value in batch.items():
                padded[name][: len(value)] = value
            yield padded
            number += 1


def _packed_alone(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The result of seqio's packing for rows [B, L] of one example each: segment 1 and positions up to the padding."""
    features = {}
    for stack, tokens in (
        ('encoder', batch['encoder_input_tokens']),
        ('decoder', batch['decoder_target_tokens']),
    ):
        segments = (tokens != 0).astype(np.int32)
        features[f'{stack}_segment_ids'] = segments
        features[f'{stack}_positions'] = segments * np.arange(tokens.shape[1], dtype=np.int32)
    # Unpacked, the shifted targets carry their EOS into the padding.
    features['decoder_input_tokens'] = batch['decoder_input_tokens'] * features['decoder_segment_ids']
    return features


def _vocabulary_identity(vocabulary: Any, source: RandomAccessSource | None) -> dict[str, JSON]:
    model = getattr(vocabulary, 'sp_model', None)
    # T5's sentinels follow from the size.
    custom = source is not None and source.sentinels != counted_down(vocabulary)
    return {
        **({'sentinels': list(source.sentinels)} if custom else {}),
        'kind': type(vocabulary).__name__,
        'size': int(vocabulary.vocab_size),
        'extra_ids': int(vocabulary.extra_ids),
        'sha256': None if model is None else hashlib.sha256(model).hexdigest(),
    }
