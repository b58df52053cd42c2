"""What is going on, on the terminal, while something takes long."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
)

__all__ = ["bars", "status"]


def bars(console: Console, *columns: ProgressColumn | str, shown: bool = True) -> Progress:
    """Return bars that are shown on a console while they move, and leave nothing there.

    Standard output and error stay the process's own meanwhile: they may be a file, or another
    thread's.

    Args:
        console: the terminal.
        columns: of each bar; none for rich's own.
        shown: whether they are.
    """
    return Progress(
        *(columns or Progress.get_default_columns()),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not shown,
    )


@contextlib.contextmanager
def status(what: str, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Show ``what`` on standard error, if that is a terminal; yield what adds the step."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with bars(console, *columns, shown=shown and console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda step: progress.update(task, description=f"{what}: {step}")
