"""The exported names: lazy, complete, and not overwritten by modules of the same name."""

import importlib
import pathlib
import pkgutil
import signal
import subprocess
import sys

import pytest

import upcycle


def test_importing_the_package_imports_nothing_heavy():
    code = (
        'import sys, upcycle; assert "load" in dir(upcycle); sys.exit("jax" in sys.modules or "numpy" in sys.modules)'
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_no_module_has_an_exported_name():
    folder = pathlib.Path(upcycle.__file__).parent
    assert not {path.stem for path in folder.iterdir()} & {*upcycle.__all__}


def test_the_names_are_what_they_are_after_every_module_is_imported():
    before = signal.getsignal(signal.SIGINT)
    try:
        for module in pkgutil.walk_packages(upcycle.__path__, 'upcycle.'):
            try:
                importlib.import_module(module.name)
            except ImportError as error:  # an optional dependency
                assert not (error.name or 'upcycle').startswith('upcycle'), module.name
    finally:
        signal.signal(signal.SIGINT, before)
    from upcycle import api

    assert {*upcycle.__all__} == {*api.__all__}
    for name in upcycle.__all__:
        exported = getattr(upcycle, name)
        assert exported is getattr(api, name) and callable(exported), name
        assert exported.__module__.startswith('upcycle.') and exported.__doc__, name
    rules = upcycle.MoERule(path='mlp', leaves={'w': 'EDF'}, num_experts=2)
    assert upcycle.plan({'mlp': {'w': api.jax.ShapeDtypeStruct((2, 3), 'float32')}}, upcycle.PathRules(moe=rules)).rows
    with pytest.raises(upcycle.api.UserError, match='does not exist'):
        upcycle.load('/nowhere')


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match='no attribute'):
        _ = upcycle.nothing
