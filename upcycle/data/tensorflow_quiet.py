"""The only way this package imports TensorFlow: silently, on the CPU, and not before it is needed.

TensorFlow would otherwise take the accelerator's memory from JAX and write a dozen lines to stderr.
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

# These lines are written by C++ before TensorFlow's own log level takes effect, so no environment variable stops them.
_NOISE = re.compile(rb'[IWE]\d{4} |WARNING: All log messages before absl::InitializeLog')


@contextlib.contextmanager
def _without_startup_noise() -> Iterator[None]:
    """Holds stderr back and then writes what was held, less the start-up chatter; everything when an import fails."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        noise = _NOISE
        try:
            yield
        except BaseException:
            noise = re.compile(rb'(?!)')
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            for line in held:
                if not noise.match(line):
                    os.write(2, line)


@contextlib.contextmanager
def _keras_when_used() -> Iterator[None]:
    """Keeps TensorFlow from importing Keras, half of its import time, before something uses `tf.keras`.

    Meanwhile no thread can import Keras. A SavedModel that holds Keras objects can be loaded once `tf.keras` has been used.
    """
    name = 'keras.src.optimizers'  # TensorFlow tries to import it, and does without where it is missing
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  how Python marks a module that cannot be imported
    try:
        yield
    finally:
        sys.modules.pop(name, None)


@functools.cache
def tensorflow() -> ModuleType:
    """TensorFlow, with accelerators hidden from it."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    with _without_startup_noise(), _keras_when_used():
        tf = importlib.import_module('tensorflow')
        for kind in ('GPU', 'TPU'):
            # It raises where the program has already started TensorFlow, and then the choice was the program's.
            with contextlib.suppress(RuntimeError):
                tf.config.set_visible_devices([], kind)
        tf.get_logger().setLevel('ERROR')
    return tf


@functools.cache
def seqio() -> ModuleType:
    """seqio, after TensorFlow was imported quietly."""
    tensorflow()
    with _without_startup_noise():
        return importlib.import_module('seqio')


@functools.cache
def tfds() -> ModuleType:
    """TensorFlow Datasets, after TensorFlow was imported quietly."""
    tensorflow()
    with _without_startup_noise():
        return importlib.import_module('tensorflow_datasets')


def reason(error: BaseException) -> str:
    """The first line of an error, or the last where TensorFlow quotes code, and its kind where that line is a mere name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ['']
    first = lines[-1] if lines[0].endswith(':') else lines[0]
    plain = isinstance(error, ValueError | RuntimeError | ImportError | OSError) and first
    return (first if plain else f'{type(error).__name__}: {first}' if first else type(error).__name__).rstrip('. ')


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """TensorFlow's failures to read a vocabulary or a data set, as the user's to correct."""
    try:
        yield
    except tensorflow().errors.OpError as error:
        # Without the names of operations around it.
        reason = re.sub(r'^{{.*?}} | \[Op:.*', '', error.message.splitlines()[0])
        raise UserError(
            f'{name} cannot be read ({reason}): check the network, the credentials, and that TFDS_DATA_DIR holds the data.'
        ) from error
