"""``make sanitize``: the compiled extension under GCC's sanitizers, on each instruction set here.

AddressSanitizer and UndefinedBehaviorSanitizer: built in a copy of the sources, it computes there
what the tests of the CPU kernels compute: reads and writes beyond a tensor, and arithmetic that C++
does not define, end the process. ThreadSanitizer: the same kernels in a program without Python,
whose threads are all known to it, called from several threads at once: data races end that.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.paths import ROOT
from tests.runtime.test_cpu_backend import ISAS

MEMORY = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
THREADS = "-fsanitize=thread -g1"
CALLERS = 6
RANDOM = 300
"""Calls of each op, with all that its tensors may be."""
CHECKS = f"""
import torch
from hypothesis import HealthCheck, given, seed, settings
from tests.runtime import cpu_cases, test_cpu_int8, test_cpu_trunk
torch.set_num_threads(3)
cpu_cases.check_all_cases()
test_cpu_trunk.check_all()
test_cpu_int8.check_all()
from tests.fuzz.op_cases import OPS, check_op, op_cases
few = settings(
    max_examples={RANDOM}, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
for op in OPS:
    seed(0)(few(given(op_cases(op, "cpu"))(check_op)))()
"""
_CANNOT = "this machine cannot run these kernels"


def build(copy: Path, flags: str) -> None:
    """Build the extension in a copy of the sources."""
    for name in ("convmixer_fast", "csrc", "tests"):
        ignored = shutil.ignore_patterns("_C.*.so", "__pycache__", "kernels", "export")
        shutil.copytree(
            ROOT / name, copy / name, ignore=ignored if name == "convmixer_fast" else None
        )
    for name in ("kernels", "export", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("results"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    built = {"CXX": f"g++ {flags}", "LDFLAGS": flags, "CONVMIXER_FAST_EXT": "1"}
    print(f"building with {flags}", flush=True)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy, env={**os.environ, **built}, check=True,
    )  # fmt: skip


def on_each_isa(command: list[str], copy: Path, environment: dict[str, str], what: str) -> int:
    """Run a command on every instruction set; return how many failed."""
    failed = 0
    for isa in ISAS:
        done = subprocess.run(
            command,
            cwd=copy,
            env={**os.environ, **environment, "CONVMIXER_FAST_CPU_ISA": isa},
            capture_output=True,
            text=True,
            check=False,
        )
        if _CANNOT in done.stdout + done.stderr:
            print(f"{what}: not here: {isa}")
        elif done.returncode == 0:
            print(f"{what}: clean: {isa}", flush=True)
        else:
            failed += 1
            print(f"{what}: FAILED: {isa}\n{done.stdout}{done.stderr}", flush=True)
    return failed


def memory() -> int:
    """Return on how many instruction sets memory or arithmetic is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), MEMORY)
        libraries = ("libasan.so", "libubsan.so", "libstdc++.so")
        preloaded = " ".join(
            subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
            for name in libraries
        )
        # Python does not free all that it has at its end.
        environment = {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0"}
        environment |= {"PYTHONPATH": folder}
        return on_each_isa([sys.executable, "-c", CHECKS], Path(folder), environment, "memory")


def threads() -> int:
    """Return on how many instruction sets threads race."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        build(copy, THREADS)
        objects = [str(path) for path in copy.glob("build/temp*/csrc/cpu/*.o")]
        program = str(copy / "race")
        driver = str(copy / "tests" / "runtime" / "cpu_kernels.cpp")
        command = ["g++", *THREADS.split(), "-std=c++17", "-O2", "-Wno-psabi", "-pthread"]
        subprocess.run(
            [*command, f"-I{copy / 'csrc'}", driver, *objects, "-ldl", "-o", program], check=True
        )
        return on_each_isa(
            [program, str(CALLERS)], copy, {"TSAN_OPTIONS": "exitcode=66"}, "threads"
        )


if __name__ == "__main__":
    sys.exit(memory() + threads())
