"""The CPU kernels compiled for other processors, and run there under an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wno-psabi", "-static", "-pthread"]

pytestmark = pytest.mark.slow


@pytest.mark.exhaustive
def test_aarch64(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user-static")
    portable = [path for path in SOURCES if not path.name.startswith("isa_avx")]
    program = tmp_path / "kernels"
    command = [
        compiler,
        *FLAGS,
        f"-I{ROOT / 'csrc'}",
        str(Path(__file__).with_name("cpu_kernels.cpp")),
    ]
    command += [*map(str, portable), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run(
        [emulator, str(program)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("kernels: baseline\n")
