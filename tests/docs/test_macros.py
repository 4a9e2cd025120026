"""docs/macros.md: up to date, and nothing in it is without a meaning."""

import re
import runpy

import pytest

from tests.docs.pages import DOCS, ROOT


@pytest.fixture(scope='module')
def script():
    return runpy.run_path(str(ROOT / 'scripts' / 'macros.py'))


def test_the_page_is_what_the_script_writes(script):
    assert (DOCS / 'macros.md').read_text(encoding='utf-8') == script['page'](), 'run python scripts/macros.py'


def test_every_macro_of_our_gin_files_is_there_and_means_something(script):
    files = [path for path in (ROOT / 'gin').rglob('*.gin') if path.parent.name != 't5x']
    names = {name for path in files for name in re.findall(r'^([A-Z]\w*) = ', path.read_text(), re.MULTILINE)}
    found = script['macros']()
    assert set(found) == names
    assert len(names) > 100
    for name, macro in found.items():
        assert len(macro.meaning()) > 1, f'{name}: say it in the docstring of the field that it is bound to'
        assert macro.kinds()


def test_defaults_and_overrides(script):
    found = script['macros']()
    assert found['NUM_EXPERTS'].default() == {'moe/base.gin': '32'}
    assert found['EVAL_PERIOD'].default() == {'runs/pretrain.gin': '1000'}
    assert found['DROP_RATIO'].meaning().startswith('r, the fraction')
    assert "`'tile'`: repeated over the experts" in found['OPTIMIZER_STATE'].meaning()
