"""What every test needs before torch, Triton and timm are used."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Without a device Triton's kernels run in its interpreter, which must be chosen
# before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Several workers of pytest-xdist share the processors: threads of PyTorch's that spin would take
# them from each other. What depends on threads sets their number itself.
if "PYTEST_XDIST_WORKER" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    torch.set_num_threads(share)

import pytest

from convmixer_fast.runtime import self_check
from tests.timm_models import has_timm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need what is not here, and say what they need."""
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    no_timm = pytest.mark.skip(reason="needs timm and torchvision: pip install '.[timm]'")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        if item.get_closest_marker("timm") and not has_timm():
            item.add_marker(no_timm)


def pytest_collection_finish() -> None:
    """What the imports made stays: the garbage collector need not go over it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _checked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every model counts as checked: tests compare more, and minutes are few there."""
    if torch.cuda.is_available():
        monkeypatch.setattr(self_check, "_file", lambda fused: Path(__file__))


@pytest.fixture(autouse=True)
def _device_stays_alive() -> Iterator[None]:
    """End the process where a test broke the CUDA context: all later ones would fail with it."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"this test broke the CUDA context: {error}", file=sys.stderr, flush=True)
            os._exit(70)


@pytest.fixture(autouse=True)
def _ieee_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 means float32 in the tests: on a GPU PyTorch's convolutions default to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
