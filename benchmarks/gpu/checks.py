"""Is every form of every kernel right on this device? Compiled and checked on all cores at once.

One process a core, each with a share of what there is to check; one that a broken kernel takes
the device from is started again, and goes on behind it. What they compile is in Triton's cache
when the kernels' times are taken.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from convmixer_fast.benchmarks.gpu.options import add_batch_options, batch_arguments
from convmixer_fast.benchmarks.gpu.processes import ROOT

__all__ = ["main", "right_tiles"]

_POLL_S = 0.2


class Task(NamedTuple):
    """One thing to check."""

    name: str
    facts: dict[str, Any]
    """What else the row of its result says."""
    check: Callable[[Any], Any]
    """From the device to a :class:`forms.Finding`."""


def main() -> int:
    """Check everything; return 0 if all forms are right. Or be one of the processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.checks", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file of the results")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 1)))
    parser.add_argument("--no-forms", action="store_true", help="tiles alone")
    parser.add_argument("--share", help="of this process: 3/12")
    add_batch_options(parser)
    arguments = parser.parse_args()
    if arguments.share:
        index, count = map(int, arguments.share.split("/"))
        _work(arguments, index, count)
        return 0
    rows = _all_workers(arguments)
    _write(arguments.output, rows)
    bad = [row for row in rows if row["status"] != "ok"]
    for row in bad:
        print(f"{row['status']}: {row['name']}: error {row['error']}: {row['note']}")
    forms = [row for row in rows if row["kind"] == "form"]
    tiles = [row for row in rows if row["kind"] == "tile"]
    print(f"forms: {_count(forms)}; tiles: {_count(tiles)}")
    whole = arguments.no_forms or bool(forms)
    return 0 if whole and all(row["status"] == "ok" for row in forms) else 1


def right_tiles(path: Path) -> set[str] | None:
    """Return the names of the tiles that were found right; None where nothing was checked."""
    if not path.exists():
        return None
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["name"] for row in rows if row["kind"] == "tile" and row["status"] == "ok"}


def _count(rows: list[dict[str, Any]]) -> str:
    return f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} right"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def _all_workers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{index}.jsonl" for index in range(arguments.workers)]
        processes = [_start(arguments, log, index) for index, log in enumerate(logs)]
        deadline = time.monotonic() + arguments.seconds
        while time.monotonic() < deadline:
            for index, process in enumerate(processes):
                if process.poll() not in (None, 0):
                    _mark_crash(logs[index])
                    processes[index] = _start(arguments, logs[index], index)
            if all(process.poll() == 0 for process in processes):
                break
            time.sleep(_POLL_S)
        for process in processes:
            process.kill()
            process.wait()
        rows = [row for log in logs for row in _read(log).values()]
    for row in rows:
        if row["status"] == "started":
            row |= {"status": "unfinished", "note": "its time was over"}
    return sorted(rows, key=lambda row: row["number"])


def _start(arguments: argparse.Namespace, log: Path, index: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.gpu.checks", "--output", str(log)]
    command += ["--share", f"{index}/{arguments.workers}"]
    command += batch_arguments(arguments.dtype, arguments.only)
    command += ["--rehearse"] if arguments.rehearse else []
    command += ["--no-forms"] if arguments.no_forms else []
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _read(log: Path) -> dict[int, dict[str, Any]]:
    """Return the last line of each task, by its number."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["number"]: row for row in rows}


def _append(log: Path, row: dict[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _mark_crash(log: Path) -> None:
    for row in _read(log).values():
        if row["status"] == "started":
            _append(log, {**row, "status": "crashed", "note": "the process died"})


def _work(arguments: argparse.Namespace, index: int, count: int) -> None:
    """Do a share of the tasks, but for those that the log has."""
    import torch

    device = torch.device("cpu" if arguments.rehearse else "cuda")
    log: Path = arguments.output
    done = _read(log)
    for number, task in enumerate(_tasks(device, arguments)):
        if number % count != index or number in done:
            continue
        row = {"number": number, "name": task.name, **task.facts}
        row |= {"status": "started", "error": None, "limit": None, "seconds": None, "note": ""}
        _append(log, row)
        began = time.perf_counter()
        try:
            found = task.check(device)
            row |= {"status": found.status, "note": found.note, "limit": found.limit}
            row["error"] = found.error if found.error == found.error else None
        except Exception as problem:
            text = " ".join(str(problem).split())[:300]
            row |= {"status": "failed", "note": f"{type(problem).__name__}: {text}"}
        lost = _is_lost(device)
        row |= {"status": "crashed"} if lost else {}
        _append(log, row | {"seconds": round(time.perf_counter() - began, 2)})
        if lost:
            # What runs at exit would use the device that is lost.
            os._exit(75)


def _is_lost(device: Any) -> bool:
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _tasks(device: Any, arguments: argparse.Namespace) -> Iterator[Task]:
    import torch

    from convmixer_fast.benchmarks.gpu.candidates import chosen_batches, tiles_for
    from convmixer_fast.benchmarks.gpu.forms import check_tile, forms, tiny_forms
    from convmixer_fast.runtime.sweep import Trial

    if not arguments.no_forms:
        for form in tiny_forms() if arguments.rehearse else forms():
            yield Task(form.name, {"kind": "form"}, form.check)
    made: dict[object, Trial] = {}  # the batch's that is being looked at: no more fit in memory

    def check(device: torch.device, batch: Any, tile: Any) -> Any:
        if batch not in made:
            made.clear()
            made[batch] = Trial(batch.problem, batch.images, device)
        return check_tile(made[batch], tile)

    for batch in chosen_batches(arguments):
        for tile in list(tiles_for(batch, device))[: 2 if arguments.rehearse else None]:
            yield Task(
                f"{batch}: {tile}",
                {"kind": "tile"},
                lambda device, batch=batch, tile=tile: check(device, batch, tile),  # type: ignore[misc]
            )


if __name__ == "__main__":
    sys.exit(main())
