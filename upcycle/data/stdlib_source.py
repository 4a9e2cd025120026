"""Text that needs no download: the source code of the running Python's standard library, about 13 MB."""

from __future__ import annotations

import pathlib
import sysconfig

from upcycle.data import corpus

# Tests are repetitive and contain other encodings on purpose; installed packages differ between machines.
_LEFT_OUT = {'test', 'tests', 'idle_test', 'idlelib', 'site-packages', 'dist-packages', '__pycache__'}


def stdlib_documents() -> list[corpus.Document]:
    """The standard library's .py files; about 5%, chosen by the hashes of their paths, are the validation split."""
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob('*.py')}
    names = [name for name in paths if not _LEFT_OUT & set(name.split('/')) and not name.startswith('_sysconfigdata')]
    splits = corpus.split_by_hash(names)
    return [corpus.Document(name, splits[name], paths[name].read_bytes()) for name in names]
