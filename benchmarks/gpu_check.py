"""``make gpu-check``: everything that only a GPU can tell, by one command, in under 8 minutes.

For a bare machine with a CUDA device: a checkout, and a Python that has PyTorch, Triton,
pybind11, pytest and timm; no network, no virtual environment, nothing installed. Each step is a
process of its own, so that one that dies takes no other with it, and what it found is on the
disk before the next begins.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

__all__ = ["DEVICE_TESTS", "SMALL_TESTS", "main"]

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "micro", "model", "build")
DEVICE_TESTS = [
    "tests/kernels/test_triton_models.py",
    "tests/kernels/test_triton_kernels.py",
    "tests/kernels/test_triton_configs.py",
    "tests/kernels/test_trunk.py",
    "tests/runtime/test_cuda_graphs.py",
    "tests/test_ops.py",
    "tests/runtime/test_sweep.py",
    "tests/runtime/test_tuning.py",
    "tests/export/test_tensorrt_export.py",
    "tests/export/test_onnx_module.py",
    "tests/commands/test_demo.py",
    "-m",
    "cuda or device",
]
"""pytest's arguments for all that runs on a GPU where there is one: files by name, so that one
that cannot be imported stops no other."""
SMALL_TESTS = [
    "tests/kernels/test_triton_kernels.py",
    "tests/kernels/test_triton_configs.py",
    "-k",
    "test_odd_shape or test_one_position or test_patches or test_tma",
]
"""Those of them with small shapes, for the sanitizer and the rehearsal."""

_NEEDED = (
    *("torch", "triton", "numpy", "pybind11", "safetensors", "PIL", "rich", "typer"),
    *("pytest", "hypothesis"),
)
_RESTARTS = 5
_TIMED_OUT = 124
_RESERVE = 40.0
"""Seconds left when the models' time is over: for the last of them, the build, the report."""
_GRACE_S = 15.0
# Seconds of the whole that tests, and tests and micro-benchmarks, may take.
_TESTS_END, _MICRO_END = 210.0, 310.0


def main() -> int:
    """Run the parts asked for; return 0 if the tests passed and no result of ours was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>-<date>")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything (default 7.5)")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU, in Triton's interpreter, tiny"
    )
    arguments = parser.parse_args()
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu-check needs what this Python lacks: {', '.join(missing)}", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available() and not arguments.rehearse:
        print("gpu-check needs a CUDA device; --rehearse tries it without one", file=sys.stderr)
        return 2
    output = arguments.output or _default_output(arguments.rehearse)
    output.mkdir(parents=True, exist_ok=True)
    return _Check(output.resolve(), 60 * arguments.minutes, arguments.rehearse).run(arguments.part)


def _default_output(rehearse: bool) -> Path:
    import torch

    from convmixer_fast.benchmarks.environment import environment

    slug = environment(torch.device("cpu" if rehearse else "cuda")).slug()
    return ROOT / "benchmarks" / "results" / (f"rehearsal-{slug}" if rehearse else slug)


class _Check:
    def __init__(self, output: Path, seconds: float, rehearse: bool) -> None:
        self.output, self.seconds, self.rehearse = output, seconds, rehearse
        self.began = time.monotonic()
        self.failed: list[str] = []
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if rehearse:
            self.environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(self, part: str) -> int:
        for name in PARTS if part == "all" else (part,):
            step = {
                "build": self.build,
                "tests": self.tests,
                "micro": lambda: self.measure("micro", _MICRO_END),
                "model": lambda: self.measure("model", self.seconds - _RESERVE),
            }[name]
            print(f"== {name}, {self._elapsed():.0f} s of {self.seconds:.0f} s gone", flush=True)
            if not step():
                self.failed.append(name)
        self.summarize()
        if self.failed:
            print(f"gpu-check: FAILED: {', '.join(self.failed)}; see {self.output}")
            return 1
        print(f"gpu-check: passed in {self._elapsed():.0f} s; results in {self.output}")
        return 0

    def build(self) -> bool:
        """Compile the extension into the checkout: nothing is installed."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        left = self._left(self.seconds + _RESERVE)
        if not self._log("build.txt", command, left, {"CONVMIXER_FAST_EXT": "1"}):
            return False
        (self.output / "build.txt").unlink(missing_ok=True)  # there may be room for 8 files alone
        return True

    def tests(self) -> bool:
        chosen = SMALL_TESTS if self.rehearse else DEVICE_TESTS
        command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist") is not None and not self.rehearse:
            command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
        # Each worker's reference runs on the CPU, beside those of the others.
        threads = {"OMP_NUM_THREADS": "1"}
        return self._log("tests.txt", [*command, *chosen], self._left(_TESTS_END), threads)

    def measure(self, part: str, end: float) -> bool:
        """Run a part of the benchmarks, again after a candidate that took the device with it."""
        from convmixer_fast.benchmarks.gpu_cases import RESTART

        for _ in range(_RESTARTS):
            left = self._left(end)
            command = [sys.executable, "-m", "benchmarks.gpu_cases", part]
            command += ["--output", str(self.output), "--minutes", f"{left / 60:.2f}"]
            command += ["--rehearse"] if self.rehearse else []
            # Its own deadline comes first; this one is for what hangs, or takes long to build.
            status = self._call(command, left + _RESERVE / 2, None)
            if status != RESTART:
                return status in (0, _TIMED_OUT) and self._ours_is_right(part)
        return False

    def summarize(self) -> None:
        """Print all results, the best peer beside ours, and keep that as text and as a page."""
        from convmixer_fast.benchmarks.report import write_report
        from convmixer_fast.benchmarks.results import read_folder
        from convmixer_fast.benchmarks.tables import summary_table, wide_console

        for unfinished in self.output.glob("*.new"):  # of a process that was ended
            unfinished.unlink()
        console = wide_console()
        console.record = True
        results = read_folder(self.output) if list(self.output.glob("*.json")) else None
        if results is not None:
            console.print(summary_table(results.rows))
            for row in results.rows:
                if row.status != "ok":
                    where = f"{row.status}: {row.provider}, {row.case}, {row.dtype}: {row.note}"
                    console.print(where, markup=False, soft_wrap=True)
            console.print(results.environment.summary(), soft_wrap=True)
        for name in ("build.txt", "tests.txt"):
            path = self.output / name
            if path.exists():
                last = path.read_text(errors="replace").strip().splitlines()[-1:]
                console.print(f"{name}: {''.join(last)}", markup=False, soft_wrap=True)
        console.save_text(str(self.output / "summary.txt"))
        if results is not None:
            try:
                write_report(results, self.output / "report.html", "convmixer_fast on a GPU")
            except Exception as error:  # a picture is not worth the exit status
                print(f"no report: {error}")

    def _ours_is_right(self, part: str) -> bool:
        from convmixer_fast.benchmarks.results import read_results

        stem = {"micro": "ops", "model": "models"}[part]
        rows = read_results(self.output / f"{stem}.json").rows
        status = [row.status for row in rows if row.ours]
        return "ok" in status and set(status) <= {"ok", "skipped"}

    def _elapsed(self) -> float:
        return time.monotonic() - self.began

    def _left(self, end: float) -> float:
        """Return the seconds until ``end``, or the end of everything if that comes first."""
        return max(15.0, min(end, self.seconds) - self._elapsed())

    def _log(
        self, name: str, command: list[str], seconds: float, more: dict[str, str] | None = None
    ) -> bool:
        path = self.output / name
        with path.open("w") as log:
            status = self._call(command, seconds, log, more)
        text = path.read_text(errors="replace")
        print(text[-6000:], flush=True)
        if not text.strip():
            path.unlink()  # there was nothing to say
        return status == 0

    def _call(
        self,
        command: list[str],
        seconds: float,
        log: IO[str] | None,
        more: dict[str, str] | None = None,
    ) -> int:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.environment, **(more or {})},
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
            return _TIMED_OUT


if __name__ == "__main__":
    sys.exit(main())
