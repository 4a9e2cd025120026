"""Setup of all tests: the CPU, quick compilation, shared programs, and tiny checkpoints."""

import importlib.metadata
import os
from collections.abc import Iterator

import pytest

from tests import compilation_cache

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Unexpected errors of commands show a traceback.
os.environ['UPCYCLE_TRACEBACK'] = '1'
_FLAGS = {
    'xla_llvm_disable_expensive_passes': 'true',
    'xla_backend_optimization_level': '0',
    'xla_cpu_parallel_codegen_split_count': '1',
}
if importlib.metadata.version('jaxlib').startswith('0.10.'):
    # Saves a fifth of a test's compilation time; later versions do not have the flag.
    _FLAGS['xla_cpu_use_fusion_emitters'] = 'false'
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get('XLA_FLAGS', ''):
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --{_flag}={_value}'
_TEMPORARY = compilation_cache.open_cache()

LARGEST = 3 << 30  # bytes of memory of a worker, above which it forgets programs

# The slowest files, slowest first: started last, a slow file would leave the other worker idle.
LONGEST = (
    'on several devices',
    'tests/gin/test_gin_files.py',
    'tests/training/test_loop.py',
    'tests/docs/test_commands.py',
    'tests/models/test_stack.py',
    'tests/test_compile.py',
    'tests/training/test_learning_curves.py',
    'tests/training/test_survival.py',
    'tests/test_buckets.py',
    'tests/scripts/test_long_run.py',
)
# One worker runs all of these, because they share processes with several devices; see `tests/invariants/devices.py`.
ON_DEVICES = ('tests/invariants/', 'tests/evaluate/test_few_shot.py')


def _scope(nodeid: str) -> str:
    """The group of tests that one worker runs: a file, or all tests that share processes."""
    file = nodeid.partition('::')[0]
    return 'on several devices' if file.startswith(ON_DEVICES) else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {scope: number for number, scope in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(_scope(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives scopes to free workers in the order of collection, unless another --dist is given."""
    from xdist.scheduler import LoadScopeScheduling

    if config.getoption('dist') != 'load':
        return None

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    config.option.loadscopereorder = False
    return ByScope(config, log)


def pytest_unconfigure() -> None:
    compilation_cache.close_cache(_TEMPORARY)


@pytest.fixture(scope='session', autouse=True)
def shared_programs() -> Iterator[None]:
    """Shares compiled programs, and processes with several devices, among the tests of a worker."""
    from tests import programs
    from tests.invariants import devices

    programs.share()
    yield
    # Earlier than pytest-xdist starts its timeout for killing workers.
    devices.close()


@pytest.fixture(scope='module', autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Frees reference cycles after each module, compiled programs among them."""
    from tests import programs

    yield
    programs.collect()
    programs.trim(LARGEST)


@pytest.fixture(scope='session')
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run folder of a tiny dense model, trained for four steps."""
    from tests import runs

    return runs.dense_checkpoint(str(tmp_path_factory.mktemp('dense')))


@pytest.fixture(scope='session')
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with one layer per stack, to upcycle with `runs.ONE_SPARSE_LAYER`."""
    from tests import runs

    path = tmp_path_factory.mktemp('shallow') / 'run'
    runs.train('dense', path, 4, **runs.ONE_LAYER)
    return str(path)


@pytest.fixture(scope='session')
def dense_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run folder of a tiny dense ViT, trained for four steps."""
    from tests import runs

    return runs.dense_checkpoint(str(tmp_path_factory.mktemp('dense')), 'vit dense')


@pytest.fixture(scope='session')
def dense_llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run folder of a tiny dense decoder-only model, trained for four steps."""
    from tests import runs

    return runs.dense_checkpoint(str(tmp_path_factory.mktemp('dense')), 'llm dense')


@pytest.fixture(scope='session')
def upcycled(tmp_path_factory: pytest.TempPathFactory, dense: str) -> str:
    """Run folder of a tiny model, upcycled from `dense` and trained for two more steps."""
    from tests import runs

    path = tmp_path_factory.mktemp('upcycled') / 'run'
    runs.train('upcycle', path, 6, INITIAL_CHECKPOINT_PATH=dense)
    return str(path)
