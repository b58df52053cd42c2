"""The kernels' tests on small shapes, under compute-sanitizer's tools."""

import argparse
import os
import shutil
import subprocess
import sys

from convmixer_fast.benchmarks.gpu.plan import SMALL_TESTS
from convmixer_fast.benchmarks.gpu.processes import ROOT

__all__ = ["main"]

_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def main() -> int:
    """Run every tool; return the first exit status that is not 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitize", description=__doc__)
    parser.add_argument("--tools", default=",".join(_TOOLS), help="comma-separated")
    parser.add_argument("--seconds", type=float, help="no limit of its own: it is ended")
    parser.add_argument("--rehearse", action="store_true", help="the tests alone, without a GPU")
    arguments = parser.parse_args()
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SMALL_TESTS]
    if arguments.rehearse:
        return subprocess.run(tests, cwd=ROOT, check=False).returncode
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer was not found; the CUDA toolkit brings it", file=sys.stderr)
        return 2
    # PyTorch's caching allocator would hide an access beyond the end of one tensor in the next.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in arguments.tools.split(","):
        print(f"== {tool}", flush=True)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tests]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
