"""Runs the steps of a plan within a time, and prints what was found as a table last."""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from convmixer_fast.benchmarks.gpu.plan import Step
from convmixer_fast.benchmarks.gpu.predictions import MODELS
from convmixer_fast.benchmarks.gpu.processes import TIMED_OUT, run

__all__ = ["Session"]

_RESTARTS = 4
_RESERVE_S = 8.0
"""For the table."""
_SLOWER = 4
"""A rehearsal, at most."""
_SHORTEST_S = 5.0
"""A step that would have less is left out."""


class Session:
    """One run of a plan.

    Args:
        output: an existing folder; what each step finds is there as soon as it is known.
        seconds: for everything.
        rehearse: without a GPU, in Triton's interpreter.
    """

    def __init__(self, output: Path, seconds: float, rehearse: bool) -> None:
        self._output, self._seconds, self._rehearse = output, seconds, rehearse
        self._began = time.monotonic()
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if rehearse:
            self._environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(self, steps: Sequence[Step]) -> int:
        """Run them in their order; return 0 if each ended well or was stopped by its time."""
        failed = []
        for step in steps:
            left = self._seconds - _RESERVE_S - self._elapsed()
            if left < _SHORTEST_S:
                self._say(f"{step.name}: left out, {self._elapsed():.0f} s are gone")
                continue
            # An interpreter on few cores takes what it takes.
            seconds = min(step.seconds * (_SLOWER if self._rehearse else 1), left)
            self._say(f"{step.name}: {self._elapsed():.0f} s gone, {seconds:.0f} s for this")
            if not self._one(dataclasses.replace(step, seconds=seconds)):
                failed.append(step.name)
        self._summarize()
        self._say(f"{self._elapsed():.0f} s in all; not well: {', '.join(failed) or 'none'}")
        return 1 if failed else 0

    def _one(self, step: Step) -> bool:
        end = time.monotonic() + step.seconds
        for _ in range(_RESTARTS):
            left = max(_SHORTEST_S, end - time.monotonic())
            command = [sys.executable, *step.command(self._output, left, self._rehearse)]
            environment = {**self._environment, **step.environment}
            if step.log is None:
                status = run(command, left, environment)
            else:
                with (self._output / step.log).open("a") as log:
                    status = run(command, left, environment, log)
                text = (self._output / step.log).read_text(errors="replace")
                print(text[-1500:], flush=True)
            if status != step.restart_on:
                return status in (0, TIMED_OUT)
        return False

    def _summarize(self) -> None:
        """Print all rows of models, the best peer beside ours, and keep that as text."""
        from convmixer_fast.benchmarks.results import read_results
        from convmixer_fast.benchmarks.tables import summary_table, wide_console

        for unfinished in self._output.glob("*.new"):  # of a process that was ended
            unfinished.unlink()
        path = self._output / "models.json"
        if not path.exists():
            return
        console = wide_console()
        console.record = True
        results = read_results(path)
        console.print(summary_table(results.rows))
        for row in results.rows:
            if row.status != "ok":
                where = f"{row.status}: {row.provider}, {row.case}, {row.dtype}: {row.note}"
                console.print(where, markup=False, soft_wrap=True)
        for case, predicted in MODELS.items():
            rates = [
                row.images_per_s
                for row in results.rows
                if row.ours and row.case == case and row.dtype == "float16" and row.images_per_s
            ]
            if rates:
                console.print(
                    f"{case}: {max(rates):,.0f} images/s, {max(rates) / predicted:.2f} of the "
                    f"predicted {predicted:,.0f}",
                    soft_wrap=True,
                )
        console.print(results.environment.summary(), soft_wrap=True)
        console.save_text(str(self._output / "summary.txt"))

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _say(self, what: str) -> None:
        print(f"== {what}", flush=True)
