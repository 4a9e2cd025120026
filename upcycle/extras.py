"""Libraries that only an extra of this package installs."""

import importlib
from types import ModuleType

from upcycle.errors import MissingData


def require(module: str, what: str, extra: str) -> ModuleType:
    """Imports an optional library.

    Args:
      module: its name.
      what: what needs it, for the message.
      extra: the extra of this package that installs it.

    Raises:
      MissingData: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingData(f'{what} needs {module.split(".")[0]}: pip install upcycle[{extra}].') from error
