"""What the pages say exists: files, names, macros, options, sentences of errors, axis letters, links."""

import argparse
import ast
import functools
import re

import pytest

from tests.docs.pages import DOCS, ROOT, code, pages
from upcycle import arguments, moe

# Names in capitals that are no macros of gin/: environment variables, and what stands for a name.
OTHER_NAMES = {
    'EPATH_USE_TF',
    'GLIBC_TUNABLES',
    'JAX_COMPILATION_CACHE_DIR',
    'JAX_COORDINATOR_PORT',
    'JAX_PLATFORMS',
    'MALLOC_ARENA_MAX',
    'MALLOC_MMAP_MAX_',
    'MALLOC_TRIM_THRESHOLD_',
    'MODEL_DIR',
    'NAME',
    'PERIOD',
    'PORT',
    'PYTHONPATH',
    'RESTARTS',
    'SBATCH_ARGS',
    'TRIES',
    'UPCYCLE_FIXTURES',
    'UPCYCLE_TEST_CACHE',
    'UPCYCLE_TRACEBACK',
    'XLA_FLAGS',
    'WANDB_MODE',
    'WANDB_PROJECT',
    'XPK_ARGS',
    'TMPDIR',
}
# Files of a run's folder, and of flaxformer.
ELSEWHERE = {'config.gin', 'experts_choose_base.gin'}
UNKNOWN = '…'


@functools.cache
def names_of_files():
    """Of the checkout, without what lies in folders such as .git and .venv."""
    found, folders = set(), [ROOT]
    for folder in folders:
        for path in folder.iterdir():
            if path.is_dir() and not path.name.startswith('.'):
                folders.append(path)
            found.add(path.name)
    return found


@pytest.mark.parametrize('page', pages(), ids=lambda page: page.name)
def test_files_are_there(page):
    names = names_of_files()
    for words in code(page):
        for word in words.split():
            if not re.fullmatch(r'[\w/.-]+\.(py|gin|sh|md|toml|yml)', word) or re.search(r'\b[A-Z]{3,}\b', word):
                continue
            found = (ROOT / word).exists() or (ROOT / 'gin' / word).exists() or ('/' not in word and word in names)
            assert found or word in ELSEWHERE, word


@pytest.mark.parametrize('page', pages(), ids=lambda page: page.name)
def test_folders_are_there(page):
    for words in code(page):
        if re.fullmatch(r'(upcycle|tests|scripts|gin|configs|docs)/([\w/]+/)?', words):
            assert (ROOT / words).is_dir(), words


@functools.cache
def macros():
    texts = [path.read_text() for path in (ROOT / 'gin').rglob('*.gin')]
    return {name for text in texts for name in re.findall(r'^([A-Z]\w*) = ', text, re.MULTILINE)}


@pytest.mark.parametrize('page', pages(), ids=lambda page: page.name)
def test_macros_are_there(page):
    names = {found[1] for words in code(page) if (found := re.fullmatch(r'([A-Z][A-Z0-9_]{3,})( ?= ?.*)?', words))}
    if page.name == 'contributing.md':
        # Which speaks of the code's own constants, looked up below.
        names &= macros()
    assert names <= macros() | OTHER_NAMES


def test_some_macros_are_looked_at():
    assert 'OPTIMIZER_STATE' in {words.split(' ')[0] for words in code(DOCS / 'choosing.md') + code(DOCS / 'vision.md')}
    assert len(macros()) > 100


@functools.cache
def subcommands():
    (action,) = (a for a in arguments.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {name: set(parser._option_string_actions) for name, parser in action.choices.items()}


@pytest.mark.parametrize('page', pages(), ids=lambda page: page.name)
def test_commands_within_a_sentence_have_these_options(page):
    for words in code(page):
        if words.startswith('upcycle ') and re.match(r'[a-z]+$', words.split()[1]):
            options = {word.split('=')[0] for word in words.split()[2:] if word.startswith('--')}
            ours = {option for option in options if not option.startswith('--gin.')}
            assert ours <= subcommands()[words.split()[1]], words


@functools.cache
def names_in(path):
    tree = ast.parse((ROOT / path).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_walks_name_what_is_in_the_code():
    text = ' '.join((DOCS / 'contributing.md').read_text(encoding='utf-8').split())
    named = re.findall(r'`(\w+)` in `([\w/]+\.py)`', text)
    assert len(named) > 20
    for name, path in named:
        assert name in names_in(path), f'{name} in {path}'


@functools.cache
def sentences():
    """Every string of the package, what is filled in shown as an ellipsis."""
    found = set()
    for path in (ROOT / 'upcycle').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else UNKNOWN for part in node.values]
                found.add(''.join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_sentences_of_errors_are_those_of_the_code():
    text = (DOCS / 'troubleshooting.md').read_text(encoding='utf-8')
    quoted = re.findall(r'^\| ([^|]+) \|', text.partition('## Without a sentence')[0], re.MULTILINE)
    quoted = [sentence for sentence in quoted if sentence != 'it says']
    assert len(quoted) > 40
    for sentence in quoted:
        assert len(sentence.replace(UNKNOWN, '')) > 15, sentence
        assert any(sentence in known for known in sentences()), sentence


def test_axis_letters_are_those_of_the_code():
    legend = ' '.join(moe.__doc__.split())
    text = (DOCS / 'concepts.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| ([A-Z]) \| (.*) \|$', text, re.MULTILINE)
    assert ''.join(letter for letter, _ in rows) == 'GSECKDFBLH'
    for letter, meaning in rows:
        assert f'{letter} {meaning}' in legend


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r'\]\(([^)#]+)', (ROOT / 'README.md').read_text(encoding='utf-8'))
    assert len(links) > 15
    for link in links:
        assert link.startswith('https://') or (ROOT / link).is_file(), link
