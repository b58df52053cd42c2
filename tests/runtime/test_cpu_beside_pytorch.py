"""The CPU engine beside PyTorch's own operations: on their threads, or on threads of its own."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from convmixer_fast.runtime import backends
from tests.sweeps import sparse

pytestmark = [
    pytest.mark.skipif(
        backends.why_not("cpu", torch.device("cpu"), torch.float32) is not None,
        reason="needs the compiled extension",
    ),
    pytest.mark.skipif(
        not Path("/proc/self/task").is_dir(), reason="needs /proc, to count the process's threads"
    ),
]

_OPENMP = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


def threads_of(code: str) -> dict[str, int]:
    """Return how many threads a new process has at the places that ``code`` names."""
    start = """
        import os, torch
        from convmixer_fast import ConvMixer, optimize
        torch.set_num_threads(3)
        fast = optimize(ConvMixer(64, 2, kernel_size=5, patch_size=2, num_classes=3).eval())
        x = torch.randn(3, 3, 64, 64)
        def count(name):
            print(name, len(os.listdir("/proc/self/task")), flush=True)
        def ours():
            with torch.inference_mode():
                fast(x)
        def theirs():
            torch.randn(1024, 1024) @ torch.randn(1024, 1024)
    """
    text = textwrap.dedent(start) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=120
    )
    rows = (line.split() for line in done.stdout.splitlines())
    return {name: int(number) for name, number in rows}


@pytest.mark.skipif(not _OPENMP, reason="needs a PyTorch whose threads are OpenMP's")
@pytest.mark.parametrize("first", sparse(["ours", "theirs"], "ours".__eq__))
def test_no_threads_besides_pytorchs(first):
    second = {"ours": "theirs", "theirs": "ours"}[first]
    found = threads_of(f"count('start'); {first}(); count('one'); {second}(); count('both')")
    assert found["one"] == found["start"] + 2
    assert found["both"] == found["one"]


@pytest.mark.exhaustive
def test_threads_of_its_own_after_fork():
    """PyTorch's do not exist in the child, and would be waited for without end."""
    found = threads_of("""
        ours()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(3)
            count('begun')
            ours()
            count('child')
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        ours()
        count('parent')
    """)
    assert found["child"] == found["begun"] + 2
    assert found["parent"] >= 3


@pytest.mark.exhaustive
def test_more_and_fewer_threads():
    found = threads_of("""
        for number in (2, 4, 3, 1, 4):
            torch.set_num_threads(number)
            ours(); theirs(); ours()
        count('end')
    """)
    assert found["end"] < 4 + 12
