"""A seqio source whose example i is a pure function of (seed, i), so a run resumes at any position without replaying.

seqio derives randomness from an example's position in a stream and finds a position by replaying the stream. Here the corpus
is one array of tokens, and example i of the endless stream is cut, shuffled and corrupted from i alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle.data import span_corruption, tensorflow_quiet
from upcycle.data.corpus import Corpus
from upcycle.data.sentinels import counted_down, require_unused
from upcycle.errors import UserError

tf = tensorflow_quiet.tensorflow()
seqio = tensorflow_quiet.seqio()

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

# Folded into the seed to make its three uses independent.
_ORDER, _PHASE, _NOISE = 1, 2, 3


def chunks_per_epoch(size: Any, length: int, shuffle: Any) -> Any:
    """Number of chunks of `length` tokens in a split of `size` tokens, for ints or int64 tensors; `shuffle` is 0 or 1.

    A shuffled epoch starts at a random phase below `length`, which costs one chunk.
    """
    return size // length - shuffle


class RandomAccessSource(seqio.DataSource):
    """Yields requests for chunks of a tokenised corpus, which the preprocessor `chunks_of` answers.

    Chunks depend on the feature lengths, which seqio passes to preprocessors but not to sources. So this source yields one
    request per epoch, and the preprocessor turns it into the examples of that epoch.
    """

    def __init__(self, read: Callable[[], Corpus], sentinels: Sequence[int]):
        super().__init__(splits=('train', 'validation'), caching_permitted=False, performs_internal_shuffling=True)
        self._read = functools.cache(read)
        self.sentinels = tuple(sentinels)

    @property
    def corpus(self) -> Corpus:
        """The corpus, read and tokenised at first use."""
        return self._read()

    @functools.cached_property
    def tokens(self) -> tf.Tensor:
        """`corpus.tokens` as one TensorFlow constant, shared by all pipelines."""
        return tf.constant(self.corpus.tokens)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def get_dataset(
        self,
        split: str = 'train',
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Implements seqio's interface: one epoch, with examples dealt out to the shards round robin."""
        if seed is None:
            seed = int(np.random.default_rng().integers(2**31))
        shard = shard_info or seqio.ShardInfo(index=0, num_shards=1)
        return self.request(split, shuffle=shuffle, seed=seed, first=shard.index, stride=shard.num_shards)

    def request(
        self,
        split: str,
        *,
        shuffle: bool,
        seed: int,
        first: int = 0,
        rows: Sequence[int] = (0,),
        stride: int = 1,
        endless: bool = False,
    ) -> tf.data.Dataset:
        """Requests the examples at offsets `rows`, ascending, from `first`, then from `first + stride`, ...

        The examples end with the epoch, or continue through all epochs if `endless`.
        """
        offset, size = self.corpus.splits[split]
        numbers = {
            'seed': seed,
            'shuffle': shuffle,
            'offset': offset,
            'size': size,
            'first': first,
            'stride': stride,
            'endless': endless,
        }
        request = {name: tf.constant(int(n), tf.int64) for name, n in numbers.items()}
        return tf.data.Dataset.from_tensors(request | {'rows': tf.constant(rows, tf.int64)})


def chunks_of(source: RandomAccessSource) -> Callable[..., tf.data.Dataset]:
    """Returns the preprocessor that answers the requests of `source`.

    Its examples have 'targets', int32 chunks of exactly the length that span corruption needs, and 'seed', int64 [2].
    """

    def preprocess(
        dataset: tf.data.Dataset, sequence_length: Mapping[str, int], output_features: Mapping[str, Any]
    ) -> tf.data.Dataset:
        length = span_corruption.checked_lengths(sequence_length, source.sentinels).tokens
        tokens = source.tokens

        def indices(epoch: tf.Tensor, request: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
            per_epoch = chunks_per_epoch(request['size'], length, request['shuffle'])
            rows = request['rows']
            count = tf.size(rows, tf.int64)
            return (
                tf.data.Dataset.range(np.iinfo(np.int64).max)
                .map(lambda n: request['first'] + n // count * request['stride'] + rows[n % count])
                .take_while(lambda index: (request['endless'] > 0) | (index < per_epoch))
                .map(lambda index: {**request, 'index': epoch * per_epoch + index})
            )

        def example(request: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            index, shuffle = request['index'], request['shuffle']
            per_epoch = chunks_per_epoch(request['size'], length, shuffle)
            epoch, chunk = index // per_epoch, index % per_epoch
            fold_in = tf.random.experimental.stateless_fold_in

            def seed_of(purpose: int, number: tf.Tensor) -> tf.Tensor:
                return fold_in(tf.stack([request['seed'], tf.constant(purpose, tf.int64)]), number)

            shuffled = tf.random.experimental.index_shuffle(chunk, seed_of(_ORDER, epoch), per_epoch - 1)
            phase = tf.random.stateless_uniform([], seed_of(_PHASE, epoch), maxval=length, dtype=tf.int64)
            start = request['offset'] + tf.where(shuffle > 0, phase + shuffled * length, chunk * length)
            return {
                'targets': tf.cast(tf.slice(tokens, [start], [length]), tf.int32),
                'seed': seed_of(_NOISE, index),
            }

        return (
            dataset.enumerate().flat_map(indices).map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        )

    return preprocess


def span_corruption_task(
    name: str, read: Callable[[], Corpus], vocabulary: Any, sentinels: Sequence[int] | None = None
) -> seqio.Task:
    """Makes an unregistered seqio task of span corruption over a corpus, which is read at first use.

    Args:
      name: name of the task.
      read: reads the corpus.
      vocabulary: a seqio vocabulary.
      sentinels: ids in the order of their use. None: T5's, see `counted_down`.
    """
    source = RandomAccessSource(read, counted_down(vocabulary) if sentinels is None else sentinels)
    feature = seqio.Feature(vocabulary=vocabulary, add_eos=True)
    return seqio.Task(
        name,
        source=source,
        output_features={'inputs': feature, 'targets': feature},
        preprocessors=[
            chunks_of(source),
            functools.partial(span_corruption.span_corruption, sentinels=source.sentinels),
            seqio.preprocessors.append_eos_after_trim,
        ],
        shuffle_buffer_size=None,
    )


def check_split(source: RandomAccessSource, split: str, lengths: span_corruption.Lengths, shuffle: bool) -> int:
    """Returns the number of chunks per epoch of a split.

    Raises:
      UserError: the split is unknown, is shorter than a chunk, or contains a sentinel.
    """
    length = lengths.tokens
    if split not in source.splits:
        raise UserError(f"The task has no split {split!r}: set DatasetConfig.split to 'train' or 'validation'.")
    size = source.corpus.splits[split][1]
    chunks = chunks_per_epoch(size, length, shuffle)
    if size == 0 and split == 'validation':
        raise UserError(
            "The split 'validation' is empty (a single file is not split): set VALIDATION_FILES, or give TRAIN_FILES "
            'several files.'
        )
    if chunks < 1:
        raise UserError(
            f'The split {split!r} has {size} tokens and TASK_FEATURE_LENGTHS needs at least {(1 + shuffle) * length}: give it '
            'more text, or shorten TASK_FEATURE_LENGTHS.'
        )
    require_unused(source.sentinels[: lengths.spans], source.corpus.tokens)
    return chunks
