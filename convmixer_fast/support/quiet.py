"""Silence of other libraries, without a change to what the rest of the process prints and logs."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from types import ModuleType

__all__ = ["logging_by", "printing_nothing", "without_logs"]


@contextlib.contextmanager
def printing_nothing(*modules: ModuleType) -> Iterator[None]:
    """Let functions of these modules print nothing, whatever the stream.

    Standard output and error are the process's, and stay as they are: other threads, and what
    collects output, notice nothing.
    """
    for module in modules:
        vars(module)["print"] = lambda *_, **__: None
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("print", None)


@contextlib.contextmanager
def logging_by(logger: logging.Logger, *modules: ModuleType) -> Iterator[None]:
    """Let modules that log on the root logger, ``logging.warning(...)``, do so by this one.

    The first such call of a process would give the root logger a handler.
    """
    for module in modules:
        vars(module)["logging"] = logger
    try:
        yield
    finally:
        for module in modules:
            vars(module)["logging"] = logging


@contextlib.contextmanager
def without_logs(library: str) -> Iterator[None]:
    """Drop what this thread logs by the loggers of a library; other threads' records pass."""
    here = threading.get_ident()
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == library]
    loggers = [logging.getLogger(name) for name in names]

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != here

    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)
