"""A small dense checkpoint that needs no training."""

import numpy as np
import pytest

from tests import runs
from tests.checkpoints import trees
from upcycle.models import identify


@pytest.fixture(scope='session')
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the tiny model with one layer per stack, with random parameters, at step 4."""
    folder = tmp_path_factory.mktemp('untrained')
    model = runs.build('dense', folder / 'unused', 1, **runs.ONE_LAYER).model
    rng = np.random.default_rng(0)
    tree = {name: rng.normal(size=shape) / np.sqrt(shape[0]) for name, shape in identify.shapes(model).items()}
    tree = {name: leaf.astype(np.float32) for name, leaf in tree.items()}
    return trees.write(folder / 'dense', 'upcycle', tree | {'step': np.asarray(4, np.int32)})
