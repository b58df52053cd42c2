"""TensorRT's progress while it builds an engine, as bars on the terminal."""

import threading
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from convmixer_fast.support.progress import bars

__all__ = ["BuildProgress"]


class BuildProgress:
    """A ``with`` block during which ``monitor`` shows every phase of a build as a bar.

    Args:
        trt: the bindings.
        shown: whether anything is printed.
    """

    def __init__(self, trt: Any, shown: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True, quiet=not shown)
        progress = bars(console, *columns, shown=shown)
        tasks: dict[str, Any] = {}
        depths: dict[str, int] = {}
        # TensorRT calls from several threads.
        lock = threading.Lock()

        class Monitor(trt.IProgressMonitor):
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(
                self, phase_name: str, parent_phase: str | None, num_steps: int
            ) -> None:
                """Add a bar, indented under the phase that this one is a part of."""
                with lock:
                    depths[phase_name] = depths.get(parent_phase or "", -1) + 1
                    text = "  " * depths[phase_name] + phase_name
                    tasks[phase_name] = progress.add_task(text, total=num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                """Move a bar; False would cancel the build."""
                with lock:
                    if phase_name in tasks:
                        progress.update(tasks[phase_name], completed=step + 1)
                return True

            def phase_finish(self, phase_name: str) -> None:
                """Remove a bar, which may not be full yet."""
                with lock:
                    depths.pop(phase_name, None)
                    if phase_name in tasks:
                        progress.remove_task(tasks.pop(phase_name))

        self._progress = progress
        self.monitor = Monitor()
        """An ``IProgressMonitor``; it must outlive the build."""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
