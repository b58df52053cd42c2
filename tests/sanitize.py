"""``make sanitize``: the compiled extension under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds it so in a copy of the sources, and computes there, on each instruction set that the machine
has, what the tests of the CPU kernels compute: reads and writes beyond a tensor, and arithmetic
that C++ does not define, end the process.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.paths import ROOT
from tests.runtime.test_cpu_backend import ISAS

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
CHECKS = """
import torch
from convmixer_fast import _C
from tests.runtime import cpu_cases, test_cpu_int8, test_cpu_trunk
torch.set_num_threads(3)
cpu_cases.check_all_cases()
test_cpu_trunk.check_all()
test_cpu_int8.check_all()
print("clean:", _C.isa())
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("convmixer_fast", "csrc", "tests"):
            ignored = shutil.ignore_patterns("_C.*.so", "__pycache__", "kernels", "export")
            shutil.copytree(
                ROOT / name, copy / name, ignore=ignored if name == "convmixer_fast" else None
            )
        for name in ("kernels", "export", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("results"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        built = {"CXX": f"g++ {FLAGS}", "LDFLAGS": FLAGS, "CONVMIXER_FAST_EXT": "1"}
        print("building", flush=True)
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=copy, env={**os.environ, **built}, check=True,
        )  # fmt: skip
        libraries = ("libasan.so", "libubsan.so", "libstdc++.so")
        preloaded = " ".join(
            subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
            for name in libraries
        )
        # Python does not free all that it has at its end.
        sanitized = {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0"}
        sanitized |= {"PYTHONPATH": folder}
        failed = 0
        for isa in ISAS:
            done = subprocess.run(
                [sys.executable, "-c", CHECKS],
                cwd=copy,
                env={
                    **os.environ,
                    **sanitized,
                    "PYTHONPATH": folder,
                    "CONVMIXER_FAST_CPU_ISA": isa,
                },
                capture_output=True,
                text=True,
                check=False,
            )
            if "this machine cannot run these kernels" in done.stderr:
                print(f"not here: {isa}")
            elif done.returncode == 0:
                print(done.stdout.strip(), flush=True)
            else:
                failed += 1
                print(f"FAILED: {isa}\n{done.stdout}{done.stderr}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
