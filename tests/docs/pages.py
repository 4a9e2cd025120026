"""What the tests read off the documentation: pages, fenced commands, words in code."""

import functools
import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / 'docs'
_FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.DOTALL | re.MULTILINE)


class Command(NamedTuple):
    """A line of shell in a fence, with its continuations.

    Attributes:
      page: the file's name.
      words: as a shell splits them, without comments.
    """

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f'{self.page}: {shlex.join(self.words)}'


def pages() -> list[pathlib.Path]:
    """The README and every page of docs/."""
    return [ROOT / 'README.md', *sorted(DOCS.glob('*.md'))]


@functools.cache
def commands() -> tuple[Command, ...]:
    """Every command in a fence of shell, page by page, in the order of reading."""
    found = []
    for page in pages():
        for language, text in _FENCE.findall(page.read_text(encoding='utf-8')):
            if language != 'bash':
                continue
            for line in text.replace('\\\n', ' ').splitlines():
                if words := shlex.split(line, comments=True):
                    found.append(Command(page.name, tuple(words)))
    return tuple(found)


def fences(page: pathlib.Path, language: str) -> list[str]:
    """The content of a page's fences of a language."""
    return [text for found, text in _FENCE.findall(page.read_text(encoding='utf-8')) if found == language]


def languages(page: pathlib.Path) -> list[str]:
    """The languages of a page's fences."""
    return [language for language, _ in _FENCE.findall(page.read_text(encoding='utf-8'))]


def code(page: pathlib.Path) -> list[str]:
    """What stands between single backticks, outside fences, line ends taken for spaces."""
    text = _FENCE.sub('', page.read_text(encoding='utf-8'))
    return [' '.join(words.split()) for words in re.findall(r'`([^`]+)`', text)]
