"""Where the tests keep what XLA compiled: in the user's cache folder, so that a second run on a machine is quicker.

$UPCYCLE_TEST_CACHE names another folder; with 'off' the processes of one run share a temporary folder.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile

LIMIT = 2**30


def open_cache() -> pathlib.Path | None:
    """Names the folder to JAX in this process and those that it starts, unless it has one; returns it where it is temporary."""
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
        return None
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
    root = os.environ.get('UPCYCLE_TEST_CACHE')
    if root == 'off':
        temporary = pathlib.Path(tempfile.mkdtemp(prefix='upcycle_programs_'))
        os.environ['JAX_COMPILATION_CACHE_DIR'] = str(temporary)
        return temporary
    if root is None:
        root = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'upcycle' / 'tests'
    flags = hashlib.sha256(os.environ.get('XLA_FLAGS', '').encode()).hexdigest()[:8]
    version = (
        f'jaxlib-{importlib.metadata.version("jaxlib")}-python-{sys.version_info[0]}.{sys.version_info[1]}-{flags}'
    )
    trim(pathlib.Path(root), LIMIT)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(pathlib.Path(root) / version)
    return None


def trim(root: pathlib.Path, limit: int) -> None:
    """Deletes the files that were used least recently, of any version, until `limit` bytes are left."""
    files = sorted((path for path in root.rglob('*') if path.is_file()), key=lambda path: path.stat().st_atime)
    size = sum(path.stat().st_size for path in files)
    for path in files:
        if size <= limit:
            return
        size -= path.stat().st_size
        path.unlink(missing_ok=True)


def close_cache(temporary: pathlib.Path | None) -> None:
    """Deletes a temporary folder."""
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
