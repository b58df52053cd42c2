"""Packages that only a part of this one needs."""

import importlib
from types import ModuleType

from convmixer_fast.errors import MissingDependencyError

__all__ = ["need"]


def need(module: str, what: str, extra: str) -> ModuleType:
    """Import ``module``, without which ``what`` cannot be done.

    Args:
        module: its full name.
        what: what needs it, as the beginning of a sentence.
        extra: the extra of this package that installs it.

    Raises:
        MissingDependencyError: it cannot be imported; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs {module.partition('.')[0]}, which cannot be imported ({error}): "
            f"pip install 'convmixer-fast[{extra}]'"
        ) from error
