"""The compilation cache of the tests: which folder, and that nothing but its own entries is deleted."""

import os

import pytest

from tests import compilation_cache


@pytest.fixture
def unset(monkeypatch):
    for name in ('JAX_COMPILATION_CACHE_DIR', 'UPCYCLE_TEST_CACHE'):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def entry(root, name, size, used):
    path = root / 'jaxlib-1-python-3.11' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'0' * size)
    os.utime(path, (used, used))
    return path


def test_what_was_used_least_recently_goes_and_nothing_that_is_not_an_entry(tmp_path):
    old, new = entry(tmp_path, 'a-cache', 60, 1), entry(tmp_path, 'b-cache', 60, 2)
    other = entry(tmp_path, 'notes.txt', 500, 0)
    compilation_cache.trim(tmp_path, 100)
    assert not old.exists() and new.exists() and other.exists()


@pytest.mark.parametrize('variable', ['', None])
def test_an_empty_variable_is_none(variable, unset, tmp_path):
    unset.setenv('XDG_CACHE_HOME', str(tmp_path))
    if variable is not None:
        unset.setenv('UPCYCLE_TEST_CACHE', variable)
    assert compilation_cache.open_cache() is None
    assert os.environ['JAX_COMPILATION_CACHE_DIR'].startswith(f'{tmp_path}/upcycle/tests/jaxlib-')


def test_off_and_what_cannot_be_written_are_temporary(unset, tmp_path):
    (tmp_path / 'file').write_text('')
    for variable in ('off', str(tmp_path / 'file')):
        unset.setenv('UPCYCLE_TEST_CACHE', variable)
        unset.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
        temporary = compilation_cache.open_cache()
        assert temporary.is_dir() and os.environ['JAX_COMPILATION_CACHE_DIR'] == str(temporary)
        compilation_cache.close_cache(temporary)
        assert not temporary.exists()


def test_a_folder_of_the_users_own_is_kept(unset):
    unset.setenv('JAX_COMPILATION_CACHE_DIR', '/elsewhere')
    assert compilation_cache.open_cache() is None
    assert os.environ['JAX_COMPILATION_CACHE_DIR'] == '/elsewhere'
