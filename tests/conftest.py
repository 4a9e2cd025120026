"""Fixtures of pytest that several folders share."""

import os

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')


@pytest.fixture(scope='session')
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run folder of a tiny dense model, trained for four steps."""
    from tests import runs

    return runs.dense_checkpoint(str(tmp_path_factory.mktemp('dense')))
