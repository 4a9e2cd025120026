"""Synthetic batches: a pure function of (seed, number), for any number of hosts."""

import numpy as np
import pytest

from upcycle.data import DataSource, Share
from upcycle.data.synthetic import SyntheticImages, SyntheticText
from upcycle.errors import UserError

SOURCES = [
    SyntheticText({'inputs': 16, 'targets': 8}, 100, batch_size=8, seed=3, num_batches=5),
    SyntheticImages(12, 3, 10, batch_size=8, seed=3, num_batches=5),
]


@pytest.mark.parametrize('source', SOURCES, ids=['text', 'images'])
def test_batches_do_not_depend_on_hosts_or_start(source):
    assert isinstance(source, DataSource)
    whole = list(source.batches())
    assert len(whole) == 5
    assert {name: (a.shape, a.dtype) for name, a in whole[0].items()} == source.batch_spec()
    hosts = [list(source.batches(2, Share.even(i, 2))) for i in range(2)]
    for number, halves in enumerate(zip(*hosts, strict=True), 2):
        for name, array in whole[number].items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array)
    assert not np.array_equal(*(next(iter(batch.values())) for batch in whole[:2]))
    with pytest.raises(UserError, match='BATCH_SIZE = 8 is not divisible by the 3 parts'):
        source.batches(share=Share.even(0, 3))


def test_ranges():
    text, images = (next(source.batches()) for source in SOURCES)
    for name in ('encoder_input_tokens', 'decoder_target_tokens'):
        assert text[name].min() >= 1 and text[name].max() < 100
    np.testing.assert_array_equal(text['decoder_input_tokens'][:, 1:], text['decoder_target_tokens'][:, :-1])
    assert abs(images['image'].std() - 1) < 0.05 and 0 <= images['labels'].min() <= images['labels'].max() < 10
