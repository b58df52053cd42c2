"""The compiled CPU backend beside other threads and processes, and where memory runs out."""

import multiprocessing
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.runtime.cpu_cases import SHARED, Call, run_python, shared


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@shared
def test_thread_count_does_not_change_a_bit(
    make: Callable[[], Call], threads: Callable[[int], None]
) -> None:
    call = make()
    threads(1)
    expected = call()
    for count in (2, 3, 4):
        threads(count)
        for _ in range(5):
            assert torch.equal(call(), expected)


def test_concurrent_callers(threads: Callable[[int], None]) -> None:
    threads(2)
    calls = [make() for make in SHARED.values()]
    expected = [call() for call in calls]

    def repeat(index: int) -> bool:
        turn = index % len(calls)
        return all(torch.equal(calls[turn](), expected[turn]) for _ in range(30))

    with ThreadPoolExecutor(2 * len(calls)) as executor:
        assert all(executor.map(repeat, range(2 * len(calls))))


class _Blocks(Dataset[Tensor]):
    """Items that are computed by the CPU backend."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(2)
        return self.call()


def test_data_loader_worker_after_fork(threads: Callable[[int], None]) -> None:
    threads(2)
    call = SHARED["pointwise"]()
    expected = call()  # the parent's pool has its threads now
    loader = DataLoader(
        _Blocks(call),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context("fork"),
        timeout=60,
    )
    for out in loader:
        assert torch.equal(out, expected)
    assert torch.equal(call(), expected)


def test_process_ends_with_threads_parked() -> None:
    code = """
        import torch
        from tests.runtime.cpu_cases import SHARED
        torch.set_num_threads(4)
        SHARED["pointwise"]().check()
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.system() != "Linux", reason="needs Linux: limits address space")
def test_memory_error() -> None:
    code = """
        import resource, torch
        from convmixer_fast import cpu
        torch.set_num_threads(1)
        from convmixer_fast.spec import FoldedBlock
        # An activation of 1,024 channels, four times as large as the image's limit allows.
        trunk = cpu.CpuTrunk(FoldedBlock(torch.ones(1024, 1, 1, 1), None, None, None, "relu"), ())
        x = torch.ones(1, 1, 300, 300)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (96 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            trunk(x, "mean")
        except MemoryError:
            print("MemoryError")
    """
    done = run_python(code)
    assert done.stdout == "MemoryError\n", done.stderr
