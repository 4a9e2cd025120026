"""The site: it builds without a warning, every page is in its navigation, and it loads nothing from elsewhere."""

import re
import subprocess
import sys

import pytest

from tests.docs.pages import DOCS, ROOT


def test_it_builds_strictly(tmp_path):
    pytest.importorskip('mkdocs', reason='pip install upcycle[docs]')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--config-file', str(ROOT / 'mkdocs.yml')]
    done = subprocess.run([*command, '--site-dir', str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in DOCS.glob('*.md'):
        html = (tmp_path / f'{page.stem}.html').read_text(encoding='utf-8')
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', html)
        # Markdown that was not understood stays in the text.
        text = re.sub(r'<pre>.*?</pre>|<code>.*?</code>', '', html, flags=re.DOTALL)
        assert not re.search(r'<p>[^<]*(\n- |\n\d\. |\|---|```)', text)


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r'(\w+\.md)$', (ROOT / 'mkdocs.yml').read_text(encoding='utf-8'), re.MULTILINE))
    assert listed == {page.name for page in DOCS.glob('*.md')}
