"""What the two runs on a GPU do, in order of worth, and the seconds that each step may take."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from convmixer_fast.benchmarks.gpu.options import batch_arguments

__all__ = ["DEVICE_TESTS", "PLANS", "SMALL_TESTS", "Step", "sweep_steps"]

RESTART = 75
"""The exit status of models after a candidate that took the device with it."""

DEVICE_TESTS = (
    "tests/kernels/test_triton_models.py",
    "tests/kernels/test_triton_kernels.py",
    "tests/kernels/test_triton_configs.py",
    "tests/kernels/test_trunk.py",
    "tests/runtime/test_cuda_graphs.py",
    "tests/runtime/test_explain.py",
    "tests/runtime/test_stale_weights.py",
    "tests/test_ops.py",
    "tests/runtime/test_sweep.py",
    "tests/runtime/test_tuning.py",
    "tests/export/test_tensorrt_export.py",
    "tests/export/test_onnx_module.py",
    "tests/commands/test_demo.py",
)
"""All files that have something for a GPU: by name, so that one that cannot be imported stops no
other."""

SMALL_TESTS = (
    "tests/kernels/test_triton_kernels.py",
    "tests/kernels/test_triton_configs.py",
    "-k",
    "test_odd_shape or test_one_position or test_patches or test_tma",
)
"""Those of them with small shapes, for the sanitizer and the rehearsal."""


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    seconds: float
    """After which it is ended."""
    arguments: Callable[[Path, float, bool], list[str]]
    """Of Python, from the folder of the results, the seconds and whether this is a rehearsal."""
    log: str | None = None
    """The file in that folder that takes what it prints; None for the terminal."""
    environment: Mapping[str, str] = field(default_factory=dict)
    restart_on: int | None = None
    """The exit status after which it is to be run again, to go on."""

    def command(self, output: Path, seconds: float, rehearse: bool) -> list[str]:
        """Return the arguments of Python."""
        return self.arguments(output, seconds, rehearse)


def _module(name: str, *more: str, **files: str) -> Callable[[Path, float, bool], list[str]]:
    def arguments(output: Path, seconds: float, rehearse: bool) -> list[str]:
        command = ["-m", f"benchmarks.gpu.{name}", *more]
        for option, file in files.items():
            command += [f"--{option}", str(output / file)]
        # Its own end comes before the one that is made for it.
        command += ["--seconds", f"{max(2.0, seconds - 6):.0f}"]
        return command + (["--rehearse"] if rehearse else [])

    return arguments


def _models(part: str) -> Callable[[Path, float, bool], list[str]]:
    return _module("cases", part, output="")


def _tests(marked: str) -> Callable[[Path, float, bool], list[str]]:
    def arguments(output: Path, seconds: float, rehearse: bool) -> list[str]:
        # By name, so that what had ended is known where the time did not suffice.
        command = ["-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider"]
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
        if rehearse:
            command += ["-n", "0", "--collect-only", "-q"]
        return [*command, "-m", marked, *DEVICE_TESTS]

    return arguments


_CHECKS = Step("checks", 80, _module("checks", output="checks.json"))
_MODELS = Step("models", 80, _models("models"), restart_on=RESTART)
_INSIDE = Step("inside", 35, _module("inside", output="inside.json"))
_CALLS = Step("calls", 30, _module("calls", output="calls.json"))
_TILES = Step("tiles", 70, _module("tiles", output="tiles.json", checks="checks.json"))
_PEERS = Step("peers", 80, _models("peers"), restart_on=RESTART)
# Each worker's reference runs on the CPU, beside those of the others.
_ALONE = {"OMP_NUM_THREADS": "1"}
_CUDA_TESTS = Step("cuda-tests", 60, _tests("cuda"), "tests.txt", _ALONE)
"""Those that nothing else can run."""
_TESTS = Step("tests", 60, _tests("device and not cuda"), "tests.txt", _ALONE)
_SANITIZE = Step("sanitize", 40, _module("sanitize"), "tests.txt")
_NCU = Step("ncu", 50, _module("profile", output="ncu.txt"))


def sweep_steps(dtype: str, only: str) -> tuple[Step, ...]:
    """Return the steps that choose tiles: every one is compiled and checked, then timed.

    Args:
        dtype: 16-bit, by name.
        only: what the name of a batch must have in it.
    """
    chosen = batch_arguments(dtype, only)
    return (
        Step("checks", 90, _module("checks", "--no-forms", *chosen, output="checks.json")),
        Step("tiles", 80, _module("tiles", *chosen, output="tiles.json", checks="checks.json")),
    )


PLANS: Mapping[str, tuple[Step, ...]] = {
    "first": (
        *(_CHECKS, _MODELS, _CALLS, _INSIDE, _TILES),
        *(_CUDA_TESTS, _PEERS, _SANITIZE, _TESTS),
    ),
    "second": (
        # A model of the peers takes torch.compile most of a minute.
        *(_CHECKS, replace(_PEERS, seconds=170), _MODELS, _CALLS, _CUDA_TESTS),
        *(_TILES, _NCU, _SANITIZE, _TESTS),
    ),
}
"""By the command's name. What comes late is left out where time is short. No plan writes more than
eight files."""
