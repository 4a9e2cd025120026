"""Questions about the standard library, answered by its docstrings."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from serving.programs import CheckError

from upcycle.data.corpus import Document

EXAMPLES = {'train': 1000, 'validation': 80}
LENGTHS = 40, 800  # characters of an answer
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    'function': ('What does `{}` do?', 'Explain the Python function `{}`.', 'What is the function `{}` for?'),
    'method': ('What does the method `{}` do?', 'Explain the Python method `{}`.', 'What is the method `{}` for?'),
    'class': ('What is the class `{}`?', 'Explain the Python class `{}`.', 'What is the class `{}` for?'),
}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Chat = dict[str, Any]  # {'messages': [question, answer]}


def conversations(documents: Iterable[Document], examples: Mapping[str, int] = EXAMPLES) -> dict[str, list[Chat]]:
    """Makes conversations of one question and one answer, a docstring.

    Args:
      documents: source files with their split; a module is wholly in one split.
      examples: number of conversations of each split.

    Returns:
      The conversations of each split. Hashes of the questions choose and order them, so that they depend on nothing else.

    Raises:
      CheckError: the files have too few docstrings.
    """
    found: dict[str, dict[str, Chat]] = {split: {} for split in examples}
    for document in sorted(documents):
        for kind, name, docstring in _docstrings(document):
            answer = _answer(docstring)
            if answer is not None:
                chat = _chat(kind, name, answer)
                found[document.split][_hash(chat['messages'][0]['content'])] = chat
    for split, number in examples.items():
        if len(found[split]) < number:
            raise CheckError(
                f'this Python has {len(found[split])} docstrings for {split}, fewer than {number}: use 3.11.'
            )
    return {split: [found[split][key] for key in sorted(found[split])[:number]] for split, number in examples.items()}


def module_of(path: str) -> str:
    """Returns the name of the module in a file, such as 'json.decoder'."""
    return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def _docstrings(document: Document) -> Iterator[tuple[str, str, str]]:
    """Yields (kind, qualified name, docstring) of a file's public classes, functions and methods."""
    module = module_of(document.name)
    if any(part.startswith('_') for part in module.split('.')):
        return
    try:
        tree = ast.parse(document.content)
    except (SyntaxError, ValueError):
        return
    yield from _members(tree.body, module, 'function')


def _members(body: Sequence[ast.stmt], prefix: str, kind: str) -> Iterator[tuple[str, str, str]]:
    for node in body:
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)) or node.name.startswith('_'):
            continue
        name, docstring = f'{prefix}.{node.name}', ast.get_docstring(node, clean=False)
        if docstring:
            yield ('class' if isinstance(node, ast.ClassDef) else kind), name, docstring
        if isinstance(node, ast.ClassDef):
            yield from _members(node.body, name, 'method')


def _answer(docstring: str) -> str | None:
    """Returns the docstring without indentation, or its first paragraph if it is long; None if that has another length too."""
    whole = inspect.cleandoc(docstring).strip()
    candidates = (whole, whole.partition('\n\n')[0].strip())
    return next((text for text in candidates if LENGTHS[0] <= len(text) <= LENGTHS[1]), None)


def _chat(kind: str, name: str, answer: str) -> Chat:
    choices = QUESTIONS[kind]
    question = choices[int(_hash(name), 16) % len(choices)].format(name)
    return {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
