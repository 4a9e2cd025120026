"""Reference arrays computed by the original programs.

They are not part of the package: without them the tests marked `requires_fixtures` are skipped, and say so.
"""

import os
import pathlib

import pytest


def fixtures_dir() -> pathlib.Path:
    """The folder of fixtures: `$UPCYCLE_FIXTURES`, else `shared/fixtures` next to the checkout. It may not exist."""
    checkout = pathlib.Path(__file__).resolve().parents[1]
    return pathlib.Path(os.environ.get('UPCYCLE_FIXTURES') or checkout.parent / 'shared' / 'fixtures')


requires_fixtures = pytest.mark.skipif(
    not fixtures_dir().is_dir(),
    reason=f'no fixtures in {fixtures_dir()}: set UPCYCLE_FIXTURES to their folder',
)
