"""Set-up that every test shares: the CPU, quick compilation, and a tiny dense checkpoint."""

import importlib.metadata
import os
import pathlib

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most of a test's time is compiling, and most programs are compiled again by a resumed run or another test.
_CACHE = pathlib.Path(__file__).resolve().parents[1] / '.pytest_cache' / 'jax'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
_FLAGS = {'xla_llvm_disable_expensive_passes': 'true', 'xla_backend_optimization_level': '0'}
if importlib.metadata.version('jaxlib').startswith('0.10.'):
    # A fifth of what a test's compilation costs; later versions do not know the flag any more.
    _FLAGS['xla_cpu_use_fusion_emitters'] = 'false'
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get('XLA_FLAGS', ''):
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --{_flag}={_value}'


@pytest.fixture(scope='session')
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run folder of a tiny dense model, trained for four steps."""
    from tests import runs

    return runs.dense_checkpoint(str(tmp_path_factory.mktemp('dense')))


@pytest.fixture(scope='session')
def dense_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run folder of a tiny dense ViT, trained for four steps."""
    from tests import runs

    return runs.dense_checkpoint(str(tmp_path_factory.mktemp('dense')), 'vit dense')


@pytest.fixture(scope='session')
def upcycled(tmp_path_factory: pytest.TempPathFactory, dense: str) -> str:
    """The run folder of a tiny model upcycled from it and trained for two steps more."""
    from tests import runs

    path = tmp_path_factory.mktemp('upcycled') / 'run'
    runs.train('upcycle', path, 6, INITIAL_CHECKPOINT_PATH=dense)
    return str(path)
