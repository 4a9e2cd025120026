"""Imports TensorFlow lazily, silently and on the CPU. The package imports it nowhere else.

Otherwise TensorFlow takes the accelerator's memory from JAX and writes a dozen lines to stderr.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType

from upcycle.errors import UserError

# C++ code writes these lines before TensorFlow's log level takes effect, so no environment variable suppresses them.
_NOISE = re.compile(rb'[IWE]\d{4} |WARNING: All log messages before absl::InitializeLog')


@contextlib.contextmanager
def _without_startup_noise() -> Iterator[None]:
    """Buffers stderr, then writes it without the start-up messages, or all of it if the import fails."""
    sys.stderr.flush()
    terminal, imported = os.dup(2), False
    with tempfile.TemporaryFile() as buffer:
        os.dup2(buffer.fileno(), 2)
        try:
            yield
            imported = True
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            buffer.seek(0)
            for line in buffer:
                if not (imported and _NOISE.match(line)):
                    os.write(2, line)


@contextlib.contextmanager
def _keras_when_used() -> Iterator[None]:
    """Delays TensorFlow's import of Keras, half of its import time, until `tf.keras` is used.

    No thread can import Keras inside this context. A SavedModel with Keras objects can be loaded once `tf.keras` was used.
    """
    name = 'keras.src.optimizers'  # an optional import of TensorFlow
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  makes the import fail
    try:
        yield
    finally:
        sys.modules.pop(name, None)


@functools.cache
def tensorflow() -> ModuleType:
    """Imports TensorFlow with accelerators hidden from it."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    with _without_startup_noise(), _keras_when_used():
        tf = importlib.import_module('tensorflow')
        for kind in ('GPU', 'TPU'):
            # Raises if the program has already initialised TensorFlow with its own choice of devices.
            with contextlib.suppress(RuntimeError):
                tf.config.set_visible_devices([], kind)
        tf.get_logger().setLevel('ERROR')
    return tf


@functools.cache
def seqio() -> ModuleType:
    """Imports seqio, with TensorFlow imported quietly first."""
    tensorflow()
    with _without_startup_noise():
        return importlib.import_module('seqio')


@functools.cache
def tfds() -> ModuleType:
    """Imports TensorFlow Datasets, with TensorFlow imported quietly first."""
    tensorflow()
    with _without_startup_noise():
        return importlib.import_module('tensorflow_datasets')


def reason(error: BaseException) -> str:
    """Summarises an error in one line: its first line (the last if TensorFlow quotes code), with its type unless obvious."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ['']
    first = lines[-1] if lines[0].endswith(':') else lines[0]
    plain = isinstance(error, ValueError | RuntimeError | ImportError | OSError) and first
    return (first if plain else f'{type(error).__name__}: {first}' if first else type(error).__name__).rstrip('. ')


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns TensorFlow errors while reading a vocabulary or dataset into a UserError."""
    try:
        yield
    except tensorflow().errors.OpError as error:
        # Strip the names of TensorFlow operations.
        reason = re.sub(r'^{{.*?}} | \[Op:.*', '', error.message.splitlines()[0])
        raise UserError(
            f'{name} cannot be read ({reason}): check the network, the credentials, and that TFDS_DATA_DIR holds the data.'
        ) from error
