"""Processes that end when their time is over, with all that they have started."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

__all__ = ["ROOT", "TIMED_OUT", "run"]

ROOT = Path(__file__).resolve().parent.parent.parent
TIMED_OUT = 124
_GRACE_S = 10.0


def run(
    command: Sequence[str],
    seconds: float,
    environment: Mapping[str, str],
    log: IO[str] | None = None,
) -> int:
    """Run ``command`` in the checkout and return its exit status, :data:`TIMED_OUT` after so long.

    Args:
        command: the program and its arguments.
        seconds: after which it is interrupted, and killed ten seconds later.
        environment: all of its variables.
        log: takes its output and errors; None leaves them where they go.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(environment),
        stdout=log,
        stderr=subprocess.STDOUT if log is not None else None,
        process_group=0,
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        # Asked first, because pytest then prints what failed; with its workers, which would
        # stand in the way of what is measured next.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"{' '.join(command[1:4])} did not end within {seconds:.0f} s", flush=True)
        return TIMED_OUT
