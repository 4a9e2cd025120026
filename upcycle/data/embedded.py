"""Real text that needs no download: the source code of the running Python's standard library, about 13 MB.

Importing this module registers the seqio task `stdlib_span_corruption`; the files are read when it is first used. Other
versions of Python are other corpora, and their fingerprints say so.
"""

from __future__ import annotations

import pathlib
import sysconfig

from upcycle.data import corpus, random_access, tensorflow_quiet

seqio = tensorflow_quiet.seqio()

# Tests repeat themselves and hold other encodings on purpose; what is installed besides Python differs by machine.
_LEFT_OUT = {'test', 'tests', 'idle_test', 'idlelib', 'site-packages', 'dist-packages', '__pycache__'}


def stdlib_documents() -> list[corpus.Document]:
    """The standard library's .py files, of which about 5% are for validation by the hash of their paths."""
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob('*.py')}
    names = [name for name in paths if not _LEFT_OUT & set(name.split('/')) and not name.startswith('_sysconfigdata')]
    splits = corpus.split_by_hash(names)
    return [corpus.Document(name, splits[name], paths[name].read_bytes()) for name in names]


_VOCABULARY = seqio.ByteVocabulary(extra_ids=100)

STDLIB_TASK = random_access.span_corruption_task(
    'stdlib_span_corruption', lambda: corpus.build_corpus(stdlib_documents(), _VOCABULARY), _VOCABULARY
)
seqio.TaskRegistry.add_provider(STDLIB_TASK.name, STDLIB_TASK)
