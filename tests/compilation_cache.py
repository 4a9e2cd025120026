"""The tests' compilation cache, in the user's cache folder, so that a second test run is quicker.

$UPCYCLE_TEST_CACHE names another folder; with 'off' the processes of one test run share a temporary folder.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
import tempfile

LIMIT = 2**30


def open_cache() -> pathlib.Path | None:
    """Sets JAX's cache folder for this process and its children, unless it is set. Returns the folder if it is temporary."""
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
        return None
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
    root = os.environ.get('UPCYCLE_TEST_CACHE')
    if root != 'off':
        # Without a writable home folder, fall back to a temporary one.
        with contextlib.suppress(RuntimeError, OSError):
            root = pathlib.Path(root).expanduser().resolve() if root else _users_folder()
            trim(root, LIMIT)
            folder = root / _version()
            folder.mkdir(parents=True, exist_ok=True)
            os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
            return None
    temporary = pathlib.Path(tempfile.mkdtemp(prefix='upcycle_programs_'))
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(temporary)
    return temporary


def _users_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'upcycle' / 'tests'


def _version() -> str:
    """Identifies compatible compiled programs: versions, machine type, and XLA's flags."""
    flags = hashlib.sha256(os.environ.get('XLA_FLAGS', '').encode()).hexdigest()[:8]
    python = f'python-{sys.version_info[0]}.{sys.version_info[1]}-{platform.machine()}'
    return f'jaxlib-{importlib.metadata.version("jaxlib")}-{python}-{flags}'


def trim(root: pathlib.Path, limit: int) -> None:
    """Deletes the least recently used entries below `root`, of any version, until at most `limit` bytes are left."""
    entries = []
    for path in root.glob('jaxlib-*/*-cache'):
        # Another test run may have deleted it.
        with contextlib.suppress(OSError):
            stat = path.stat()
            entries.append((stat.st_atime, stat.st_size, path))
    left = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if left <= limit:
            return
        path.unlink(missing_ok=True)
        left -= size


def close_cache(temporary: pathlib.Path | None) -> None:
    """Deletes a temporary folder."""
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
