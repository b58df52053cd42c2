"""``make fuzz``: random inputs by the minute, each kind in a process of its own, and a table.

What fails is printed with the seed that makes it again; what ends its process, a crash, too.
"""

import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from convmixer_fast.benchmarks.tables import wide_console
from tests.paths import ROOT

_PROPERTIES = {
    **{
        f"{op}, {backend}": (f"op_cases:check_op:op_cases:{op}:{backend}", share)
        for op in ("depthwise_block", "pointwise_block", "patch_embed")
        for backend, share in (("cpu", 2), ("reference", 1), ("triton", 2))
    },
    "models, cpu": ("model_cases:check_model:model_cases", 5),
    "determinism, cpu": ("model_cases:check_determinism:model_cases", 3),
}
_FILES = {
    "checkpoints": ("checkpoint_cases:check_checkpoint", 3),
    "images": ("image_cases:check_image", 3),
    "exports": ("export_cases:check_export", 2),
}
_GUIDED = {
    "checkpoints, by coverage": ("checkpoint", 3),
    "images, by coverage": ("image", 3),
}
_EXAMPLES = 100
_MOST_FAILURES = 5
_RESULT = "RESULT "


class _Found:
    """What came of the cases of one kind, in the process that ran them."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def failed(self, seed: int) -> None:
        """Note the exception that is being handled."""
        self.failures.append(f"seed {seed}\n{traceback.format_exc(limit=-3)}")

    def report(self) -> None:
        """Say it to the process that waits."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        said = {"outcomes": self.outcomes, "failures": self.failures, "peak_mib": peak}
        print(_RESULT + json.dumps(said), flush=True)


def _run_property(what: str, seed: int, seconds: float) -> _Found:
    import hypothesis

    module, name, strategy, *arguments = what.split(":")
    cases = importlib.import_module(f"tests.fuzz.{module}")
    check = getattr(cases, name)
    found, end = _Found(), time.monotonic() + seconds

    def one(case: object) -> None:
        if time.monotonic() < end:
            check(case)
            found.outcomes["right"] += 1

    settings = hypothesis.settings(
        max_examples=_EXAMPLES, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    while time.monotonic() < end and len(found.failures) < _MOST_FAILURES:
        given = hypothesis.given(getattr(cases, strategy)(*arguments))
        try:
            hypothesis.seed(seed)(settings(given(one)))()
        except Exception:
            found.failed(seed)
        seed += 1
    return found


def _run_files(what: str, seed: int, seconds: float) -> _Found:
    module, name = what.split(":")
    check = getattr(importlib.import_module(f"tests.fuzz.{module}"), name)
    found, end = _Found(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end and len(found.failures) < _MOST_FAILURES:
            try:
                found.outcomes[check(seed, Path(folder))] += 1
            except Exception:
                found.failed(seed)
            seed += 1
    return found


def _child(name: str, seed: int, seconds: float) -> None:
    if name in _PROPERTIES:
        _run_property(_PROPERTIES[name][0], seed, seconds).report()
    else:
        _run_files(_FILES[name][0], seed, seconds).report()


def _measured(name: str, seed: int, seconds: float) -> dict:
    """Run one kind in a process; what it found, also where it crashed."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--child", name]
    command += ["--seed", str(seed), "--minutes", str(seconds / 60)]
    environment = {"TRITON_INTERPRET": "1"} if name.endswith("triton") else {}
    done = _process(command, seconds, environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if lines:
        return json.loads(lines[-1].removeprefix(_RESULT))
    failure = f"the process ended with {done.returncode}\n{done.stderr[-2000:]}"
    return {"outcomes": {}, "failures": [failure], "peak_mib": 0}


def _guided(name: str, seed: int, seconds: float) -> dict:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return {"outcomes": {}, "failures": [], "peak_mib": 0, "missing": "pip install atheris"}
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.guided", _GUIDED[name][0]]
        command += [corpus, f"-max_total_time={seconds:.0f}", f"-seed={seed}", "-timeout=10"]
        command += ["-rss_limit_mb=3000", f"-artifact_prefix={corpus}/crash-"]
        done = _process(command, seconds, {})
    counted = [line.split() for line in done.stderr.splitlines() if line.startswith("Done ")]
    peak = [part.split("rss: ")[1] for part in done.stderr.splitlines() if "rss: " in part]
    cases = int(counted[-1][1]) if counted else 0
    return {
        "outcomes": {"tried": cases},
        "failures": [] if done.returncode == 0 else [done.stderr[-3000:]],
        "peak_mib": int(peak[-1].split("M")[0]) if peak else 0,
    }


def _process(command: list[str], seconds: float, environment: dict[str, str]):
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        errors="replace", timeout=3 * seconds + 120, check=False,
    )  # fmt: skip


def main(
    minutes: Annotated[float, typer.Option(help="For everything.")] = 10.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the first case; else another each time.")
    ] = None,
    only: Annotated[str, typer.Option(help="Kinds whose name has this in it.")] = "",
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Try random ops, models and files until the time is up; exit with 1 if one is wrong."""
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    if child is not None:
        _child(child, seed, 60 * minutes)
        return
    kinds = {name: share for name, (_, share) in (_PROPERTIES | _FILES | _GUIDED).items()}
    kinds = {name: share for name, share in kinds.items() if only in name}
    console = wide_console()
    console.print(f"seed {seed}", highlight=False)
    table = Table("kind", "seconds", "cases", "outcomes", "peak MiB", "failures")
    failed = 0
    for name, share in kinds.items():
        seconds = 60 * minutes * share / sum(kinds.values())
        run = _guided if name in _GUIDED else _measured
        found = run(name, seed, seconds)
        outcomes = ", ".join(f"{count:,} {what}" for what, count in found["outcomes"].items())
        table.add_row(
            name, f"{seconds:.0f}", f"{sum(found['outcomes'].values()):,}",
            found.get("missing", outcomes), f"{found['peak_mib']:.0f}", str(len(found["failures"])),
        )  # fmt: skip
        for failure in found["failures"]:
            console.print(f"{name}: {failure}", markup=False, highlight=False)
        failed += len(found["failures"])
    console.print(table)
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
