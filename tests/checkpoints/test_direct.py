"""Writes past the page cache."""

import errno
import os

import numpy as np
import pytest
from etils import epath

from upcycle.checkpoints.direct import BLOCK, BUFFER, DirectFile, aligned_empty


def _pieces(size: int) -> list[tuple[int, int]]:
    """Cuts `size` bytes at blocks, next to blocks, and anywhere; returns the pieces out of order."""
    cuts = [0, 1, BLOCK, 3 * BLOCK, 3 * BLOCK + 1, 7 * BLOCK - 1, 20 * BLOCK + 17, 20 * BLOCK + 18, size - BLOCK, size]
    pieces = list(zip(cuts, cuts[1:], strict=False))
    return pieces[::2] + pieces[1::2]


def _refuse_direct(monkeypatch, number: int) -> None:
    pwrite, direct = os.pwrite, os.O_DIRECT
    descriptors = set()

    def opened(path, flags, *rest, real=os.open):
        descriptor = real(path, flags, *rest)
        (descriptors.add if flags & direct else descriptors.discard)(descriptor)
        return descriptor

    def written(descriptor, data, offset):
        if descriptor in descriptors:
            raise OSError(number, os.strerror(number))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, 'open', opened)
    monkeypatch.setattr(os, 'pwrite', written)


@pytest.mark.parametrize('shift', [0, 5], ids=['aligned', 'unaligned'])
@pytest.mark.parametrize('refused', [False, True], ids=['direct', 'refused'])
def test_pieces_in_any_order_and_at_any_offset(tmp_path, monkeypatch, shift, refused):
    if refused:
        _refuse_direct(monkeypatch, errno.EINVAL)
    size = BUFFER + 40 * BLOCK + 123
    wanted = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    memory = aligned_empty((size + shift,), np.uint8)[shift:]
    memory[:] = wanted
    path = epath.Path(tmp_path / 'file')
    path.write_bytes(b'left' * size)  # longer, by an earlier writer
    file = DirectFile(path, aligned_empty((BUFFER,), np.uint8))
    for start, stop in _pieces(size):
        file.write(memory[start:stop].data, start)
    file.finish(size)
    assert path.read_bytes() == wanted.tobytes()


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    _refuse_direct(monkeypatch, errno.ENOSPC)
    file = DirectFile(epath.Path(tmp_path / 'file'), aligned_empty((BUFFER,), np.uint8))
    if file._direct is None:
        pytest.skip('the file system has no direct writes')
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        file.write(aligned_empty((BLOCK,), np.uint8).data, 0)
    file.close()
