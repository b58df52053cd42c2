"""What is going on, on the terminal, while something takes long."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console

__all__ = ["status"]


@contextlib.contextmanager
def status(what: str, shown: bool) -> Iterator[Callable[[str], None]]:
    """Show ``what`` on standard error, if that is a terminal; yield what replaces it."""
    terminal = Console(stderr=True, quiet=not shown)
    with terminal.status(what) as line:
        yield lambda step: line.update(f"{what}: {step}")
