"""Where the arrays computed by the original programs lie, and how a test says that it needs them.

They are data to compare with, not part of the package: a machine without them skips those tests and says so.
"""

import os
import pathlib

import pytest


def fixtures_dir() -> pathlib.Path:
    """The folder of fixtures: `$UPCYCLE_FIXTURES`, else `../shared/fixtures` beside the checkout. It may be absent."""
    checkout = pathlib.Path(__file__).resolve().parents[1]
    return pathlib.Path(os.environ.get('UPCYCLE_FIXTURES') or checkout.parent / 'shared' / 'fixtures')


requires_fixtures = pytest.mark.skipif(
    not fixtures_dir().is_dir(),
    reason=f'no fixtures of the original programs in {fixtures_dir()}: set UPCYCLE_FIXTURES to their folder',
)
