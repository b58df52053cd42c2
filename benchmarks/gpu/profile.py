"""Nsight Compute's sections for each of our kernels, on published shapes.

Without an argument this runs itself under ``ncu``; with ``--workload`` it is what ``ncu`` runs:
every kernel is compiled and warmed up, and one call of each stands between the marks that tell
``ncu`` what to look at.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from convmixer_fast.benchmarks.op_cases import depthwise_case, patch_embed_case, pointwise_case
from convmixer_fast.benchmarks.subjects import Case

__all__ = ["main", "profile_cases", "workload"]

_SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
)


def profile_cases(rehearse: bool) -> Iterator[Case]:
    """Yield the ops to look at: the published shapes in float16; tiny ones for a rehearsal."""
    half = torch.float16
    if rehearse:
        yield depthwise_case(6, 5, 3, 1, half)
        yield pointwise_case(16, 4, 1, half)
        yield patch_embed_case(8, 6, 3, 1, half)
        return
    yield depthwise_case(1536, 32, 9, 64, half)
    yield pointwise_case(1536, 32, 64, half)
    yield depthwise_case(768, 32, 7, 64, half, "relu")
    yield pointwise_case(768, 32, 64, half, "relu")
    yield depthwise_case(1024, 16, 9, 64, half)
    yield pointwise_case(1024, 16, 64, half)


def workload(rehearse: bool) -> None:
    """Run each case's kernels, marking one call of each."""
    device = torch.device("cpu" if rehearse else "cuda")
    for case in profile_cases(rehearse):
        with torch.inference_mode():
            subject = case.make(device)
            assert subject.fuse is not None
            fused, x = subject.fuse("triton"), subject.input(0)
            for _ in range(1 if rehearse else 3):
                fused(x)
            print(f"{case.bench}: {case.name}", flush=True)
            if rehearse:
                fused(x)
                continue
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            fused(x)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def main() -> int:
    """Profile, or be what is profiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profile", description=__doc__)
    parser.add_argument("--output", type=Path, help="the text file of what it says")
    parser.add_argument("--seconds", type=float, help="no limit of its own: it is ended")
    parser.add_argument("--ncu", default="ncu", help="the profiler's command")
    parser.add_argument("--workload", action="store_true", help="run the kernels alone")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, without ncu")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    if arguments.workload or arguments.rehearse:
        workload(arguments.rehearse)
        return 0
    if shutil.which(arguments.ncu) is None:
        print(f"{arguments.ncu} was not found; Nsight Compute brings it", file=sys.stderr)
        return 2
    if arguments.output is None:
        parser.error("--output is needed")
    return subprocess.run(ncu_command(arguments.ncu, arguments.output), check=False).returncode


def ncu_command(ncu: str, log: Path) -> list[str]:
    """Return the command that profiles :func:`workload` into ``log``."""
    sections = [argument for name in _SECTIONS for argument in ("--section", name)]
    return [
        ncu, "--target-processes", "all", "--profile-from-start", "off", "--clock-control", "none",
        *sections, "--page", "details", "--log-file", str(log),
        sys.executable, "-m", "benchmarks.gpu.profile", "--workload",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
