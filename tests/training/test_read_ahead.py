"""Reading ahead gives the same leaves and errors as reading on request."""

import threading

import numpy as np
import pytest

from upcycle.errors import UserError
from upcycle.surgery.fingerprint import sha256_of
from upcycle.training import read_ahead
from upcycle.training.read_ahead import Examination, ReadAhead


class Source:
    def __init__(self):
        self.asked = []
        self.lock = threading.Lock()

    def __call__(self, name, sharding):
        with self.lock:
            self.asked.append(name)
        if name == 'broken':
            raise UserError('broken cannot be read')
        return np.full(2, int(name))


def test_each_leaf_is_read_once():
    source = Source()
    requests = [(str(i), None) for i in range(20)]
    with ReadAhead(source, requests) as reading:
        for name, _ in requests:
            assert reading(name, None)[0] == int(name)
    assert sorted(source.asked) == sorted(name for name, _ in requests)


def test_any_order_and_leaves_that_were_not_announced():
    source = Source()
    with ReadAhead(source, [(str(i), None) for i in range(10)]) as reading:
        assert [reading(str(i), None)[0] for i in (9, 99, 3, 0, 8)] == [9, 99, 3, 0, 8]
        # Only a few leaves are read ahead.
        assert len(source.asked) <= 5 + read_ahead._LEAVES_AHEAD + 2


def test_a_damaged_leaf_is_reported_on_request():
    with ReadAhead(Source(), [('1', None), ('broken', None), ('2', None)]) as reading:
        assert reading('1', None)[0] == 1
        with pytest.raises(UserError, match='broken cannot be read'):
            reading('broken', None)


def examine(leaves):
    """Checks all leaves; examines those with even numbers whole."""
    whole = [name for name in leaves if name.isdigit() and int(name) % 2 == 0]
    examination = Examination('here', leaves, whole, sha256_of, leaves.get)
    try:
        for name, leaf in leaves.items():
            examination.check(name, leaf)
        return examination.result()
    finally:
        examination.close()


def test_examination():
    leaves = {str(i): np.arange(i, dtype=np.float32) for i in range(20)}
    assert examine(leaves) == {name: sha256_of(name, leaf) for name, leaf in leaves.items() if int(name) % 2 == 0}
    for name in ('x', '22'):
        with pytest.raises(UserError, match=f'{name} of here holds 1 numbers that are NaN'):
            examine({**leaves, name: np.array([1.0, np.nan], np.float32)})
