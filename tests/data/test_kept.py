import numpy as np
import pytest

from upcycle.data import WHOLE, Share
from upcycle.data.kept import Kept


class Counted:
    """Two batches of 8 x 4 bytes, with a count of passes."""

    asked = 0

    def batches(self, start=0, share=WHOLE):
        self.asked += 1
        for number in range(start, 2):
            yield {'tokens': np.full([8 // share.count], number * 10 + share.index, np.int32)}


def values(batches):
    return [batch['tokens'][0].item() for batch in batches]


@pytest.mark.parametrize(('limit', 'asked'), [(64, 1), (63, 3)])
def test_what_fits_is_read_once(limit, asked):
    source = Counted()
    kept = Kept(source, limit)
    assert [values(kept.batches()) for _ in range(3)] == [[0, 10]] * 3
    assert source.asked == asked


def test_a_pass_that_was_broken_off_is_not_kept():
    source = Counted()
    kept = Kept(source)
    next(kept.batches())
    assert values(kept.batches()) == values(kept.batches()) == [0, 10]
    assert source.asked == 2


def test_each_start_and_host_has_its_own():
    kept = Kept(Counted())
    for _ in range(2):
        assert values(kept.batches(1)) == [10]
        assert values(kept.batches(share=Share.even(1, 2))) == [1, 11]
        assert values(kept.batches()) == [0, 10]
