"""Lazy views: every region equals that of the NumPy array, and only its source region is read."""

import dataclasses
import itertools

import numpy as np
import pytest

from upcycle.checkpoints import views


@dataclasses.dataclass
class Counted:
    """An array that counts the numbers read."""

    value: np.ndarray
    read_numbers: int = 0

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    def read(self, region):
        part = self.value[region]
        self.read_numbers += part.size
        return part


def stored(*shape, first=0):
    return Counted(np.arange(first, first + np.prod(shape)).reshape(shape))


# (the source, a view of it, the same by NumPy)
VIEWS = {
    'transposed': (stored(4, 6), views.reversed_axes, np.transpose),
    'patches': (stored(2, 3, 4, 5), lambda x: views.Transposed(x, (2, 3, 1, 0)), lambda x: x.transpose(2, 3, 1, 0)),
    'split': (stored(6, 4), lambda x: views.SplitAxis(x, 0, 3), lambda x: x.reshape(3, 2, 4)),
    'heads': (
        stored(6, 4),
        lambda x: views.SplitAxis(views.reversed_axes(x), 1, 3),
        lambda x: x.T.reshape(4, 3, 2),
    ),
    'joined': (stored(4, 3, 2), lambda x: views.JoinedAxes(x, 1), lambda x: x.reshape(4, 6)),
    'joined in front': (stored(3, 2, 4), lambda x: views.JoinedAxes(x, 0), lambda x: x.reshape(6, 4)),
    'layer': (stored(4, 3, 2), lambda x: views.Layer(x, 1, 2), lambda x: x[:, 2]),
    'window': (stored(1, 5, 3), lambda x: views.Window(x, (slice(None), slice(1, None))), lambda x: x[:, 1:]),
    'computed': (
        stored(4, 2),
        lambda x: views.Computed(x.shape, x.dtype, (x,), lambda x: 2 * x),
        lambda x: 2 * x,
    ),
}


def regions(shape):
    each = [[slice(None), slice(0, 1), slice(size // 2, size)] for size in shape]
    return [region[:axes] for axes in range(len(shape) + 1) for region in itertools.product(*each)]


@pytest.mark.parametrize('kind', VIEWS)
def test_regions(kind):
    source, view, by_numpy = VIEWS[kind]
    lazy, whole = view(source), by_numpy(source.value)
    assert (lazy.shape, lazy.dtype) == (whole.shape, whole.dtype)
    for region in regions(whole.shape):
        source.read_numbers = 0
        np.testing.assert_array_equal(lazy.read(region), whole[region])
        # A split or a join reads whole pieces; a computed array reads everything.
        most = source.value.size if kind == 'computed' else 2 * whole[region].size
        exact = kind in ('transposed', 'patches', 'layer', 'window')
        assert source.read_numbers == whole[region].size if exact else source.read_numbers <= most, region


def test_a_stack_reads_the_rows_that_are_asked_for():
    sources = tuple(stored(3, 4, first=12 * i) for i in range(5))
    lazy, whole = views.Stacked(sources), np.stack([source.value for source in sources])
    assert (lazy.shape, lazy.dtype) == (whole.shape, whole.dtype)
    for region in regions(whole.shape):
        for source in sources:
            source.read_numbers = 0
        np.testing.assert_array_equal(lazy.read(region), whole[region])
        rows = range(5)[region[0]] if region else range(5)
        each = whole[0][region[1:]].size
        assert [source.read_numbers for source in sources] == [each if i in rows else 0 for i in range(5)]


def test_shapes_that_do_not_fit():
    for make in (
        lambda: views.Transposed(stored(4, 6), (0, 2, 1)),
        lambda: views.SplitAxis(stored(5, 4), 0, 3),
        lambda: views.SplitAxis(stored(6), 1, 3),
        lambda: views.Stacked((stored(4), stored(5))),
        lambda: views.Stacked(()),
    ):
        with pytest.raises(ValueError, match=r'axes|cannot be split|of one shape and dtype'):
            make()
