"""What is specific to the compiled CPU backend.

Each instruction set that the machine has, threads, fork, memory, NaN and infinities, the
error of the activations, tails of every size and any memory format; all against the
reference in float64.
"""

import multiprocessing
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

pytest.importorskip(
    "convmixer_fast._C",
    reason="needs the compiled extension: CONVMIXER_FAST_EXT=1 pip install .",
)

from convmixer_fast import _C, cpu, reference
from tests.tolerances import TOL

ROOT = Path(__file__).parent.parent
ACTIVATIONS = tuple(reference.ACTIVATIONS)
BAND = 64

DEPTHWISE = {  # N, C, H, W, K
    "odd-3": (2, 40, 13, 11, 3),
    "odd-5": (1, 40, 13, 11, 5),
    "odd-7": (2, 40, 13, 11, 7),
    "odd-9": (1, 40, 13, 11, 9),
    "k1": (1, 3, 5, 6, 1),
    "k31": (1, 5, 13, 11, 31),
    "k33-larger-than-plane": (1, 2, 4, 5, 33),
    "one-position": (3, 5, 1, 1, 7),
    "one-row": (1, 7, 1, 37, 5),
    "one-column": (1, 7, 37, 1, 5),
    "w2-h3": (2, 6, 3, 2, 3),
    "w7-h6": (2, 6, 6, 7, 5),
    "w8": (2, 6, 8, 8, 5),
    "w14": (2, 6, 14, 14, 9),
    "w16": (2, 6, 16, 16, 5),
    "w17-h9": (2, 6, 9, 17, 7),
    "w33-h23": (1, 6, 23, 33, 9),
    "several-bands": (1, 2, 301, 270, 3),
}
POINTWISE = {  # N, C_in, H, W, C_out
    "odd": (2, 40, 13, 11, 40),
    "one": (1, 1, 1, 1, 1),
    "one-position": (37, 19, 1, 1, 23),
    "k31": (1, 31, 7, 7, 29),
    "panels-cross-images": (5, 17, 3, 7, 15),
    "few-columns-many-rows": (1, 64, 2, 2, 333),
    "deep": (1, 1031, 5, 5, 27),
    "whole-tiles": (2, 64, 8, 8, 56),
}
PATCH = {  # N, C_in, H, W, C_out, P_h, P_w
    "p7": (2, 3, 28, 35, 40, 7, 7),
    "rest-of-image-unread": (2, 3, 31, 20, 13, 7, 6),
    "p1": (2, 3, 9, 11, 5, 1, 1),
    "one-patch": (3, 2, 5, 4, 17, 5, 4),
}


class Call:
    """A call of one op: its backend, its reference and its arguments."""

    def __init__(self, op: str, x: Tensor, weight: Tensor, *rest: object) -> None:
        self.run: Callable[..., Tensor] = getattr(cpu, f"{op}_cpu")
        self.reference: Callable[..., Tensor] = getattr(reference, f"{op}_ref")
        self.arguments = (x, weight, *rest)
        self.dtype = x.dtype

    def __call__(self) -> Tensor:
        return self.run(*self.arguments)

    def expected(self) -> Tensor:
        return self.reference(*(a.double() if isinstance(a, Tensor) else a for a in self.arguments))

    def check(self) -> Tensor:
        out = self()
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        expected = self.expected()
        torch.testing.assert_close(
            out.double(), expected, **TOL[self.dtype], equal_nan=True, check_stride=False
        )
        return out


def vectors(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels)


def depthwise(
    n: int, c: int, h: int, w: int, k: int, activation: str = "gelu", residual: bool = True
) -> Call:
    weight = torch.randn(c, 1, k, k) / k
    x = torch.randn(n, c, h, w)
    return Call("depthwise_block", x, weight, *vectors(c), activation, residual)


def pointwise(n: int, c: int, h: int, w: int, c_out: int, activation: str = "gelu") -> Call:
    weight = torch.randn(c_out, c, 1, 1) / c**0.5
    return Call("pointwise_block", torch.randn(n, c, h, w), weight, *vectors(c_out), activation)


def patch(
    n: int, c: int, h: int, w: int, c_out: int, p_h: int, p_w: int, activation: str = "gelu"
) -> Call:
    weight = torch.randn(c_out, c, p_h, p_w) / (c * p_h * p_w) ** 0.5
    return Call("patch_embed", torch.randn(n, c, h, w), weight, *vectors(c_out), activation)


MAKERS = {"depthwise": depthwise, "pointwise": pointwise, "patch": patch}
CASES = {
    f"{op}-{name}": (MAKERS[op], shape)
    for op, shapes in (("depthwise", DEPTHWISE), ("pointwise", POINTWISE), ("patch", PATCH))
    for name, shape in shapes.items()
}
# One call of each op, large enough to be shared by several threads.
SHARED = {
    "depthwise": lambda: depthwise(2, 40, 33, 29, 7),
    "pointwise": lambda: pointwise(2, 67, 33, 29, 71),
    "pointwise-few-columns": lambda: pointwise(1, 515, 3, 3, 1031),
    "patch": lambda: patch(2, 3, 90, 90, 71, 5, 5),
}
shared = pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)


def check_all_cases() -> None:
    """Every case, with the activations in turn: for a process of its own per ISA."""
    torch.manual_seed(0)
    for i, (make, shape) in enumerate(CASES.values()):
        make(*shape, activation=ACTIVATIONS[i % len(ACTIVATIONS)]).check()
    for activation in ("gelu", "gelu_tanh"):
        assert activation_error(activation) < 5e-7


def activation_error(activation: str) -> float:
    """The largest absolute error over a dense range and over finite floats of any size."""
    dense = torch.linspace(-10, 10, 500_009)
    bits = torch.arange(-(2**31), 2**31, 2**32 // 500_009).to(torch.int32)
    any_size = bits.view(torch.float32)
    x = torch.cat([dense, any_size[any_size.isfinite()]]).view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1)
    out = cpu.pointwise_block_cpu(x, one, None, None, None, activation)
    expected = reference.ACTIVATIONS[activation](x.double())
    return (out.double() - expected).abs().max().item()


def run_python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allocate every output full of NaN, between two bands of NaN that must stay."""
    buffers: list[tuple[Tensor, int]] = []

    def poisoned_empty(shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * BAND,), float("nan"))
        buffers.append((buffer, size))
        return buffer[BAND : BAND + size].view(shape)

    monkeypatch.setattr(cpu, "_empty", poisoned_empty)
    yield
    for buffer, size in buffers:
        assert buffer[:BAND].isnan().all()
        assert buffer[BAND + size :].isnan().all()


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("case", CASES)
def test_every_tail(case: str) -> None:
    make, shape = CASES[case]
    assert not make(*shape).check().isnan().any()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_isa(isa: str) -> None:
    code = f"""
        from tests import test_cpu_backend, test_cpu_trunk
        assert test_cpu_backend._C.isa() == {isa!r}
        test_cpu_backend.check_all_cases()
        test_cpu_trunk.check_all()
    """
    done = run_python(code, CONVMIXER_FAST_CPU_ISA=isa)
    if "this machine cannot run these kernels" in done.stderr:
        assert isa != "baseline"
        pytest.skip(f"needs a CPU with {isa}")
    assert done.returncode == 0, done.stderr


def test_unknown_isa_is_an_error() -> None:
    done = run_python("from convmixer_fast import _C; _C.isa()", CONVMIXER_FAST_CPU_ISA="pentium")
    assert "ValueError: CONVMIXER_FAST_CPU_ISA must be" in done.stderr
    assert "got 'pentium'" in done.stderr


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activation_error(activation: str) -> None:
    assert activation_error(activation) < 5e-7


@shared
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("vector_dtype", ["same", "float32"])
def test_16_bit(make: Callable[[], Call], dtype: torch.dtype, vector_dtype: str) -> None:
    call = make()
    x, weight, *rest = call.arguments
    if vector_dtype == "same":
        rest = [a.to(dtype) if isinstance(a, Tensor) else a for a in rest]
    call.arguments = (x.to(dtype), weight.to(dtype), *rest)
    call.dtype = dtype
    call.check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [True, False])
def test_absent_vectors(activation: str, residual: bool) -> None:
    x, weight = torch.randn(2, 40, 13, 11), torch.randn(40, 1, 5, 5) / 5
    none = (None, None, None, activation)
    Call("depthwise_block", x, weight, *none, residual).check()
    Call("pointwise_block", x, torch.randn(24, 40, 1, 1) / 6, *none).check()
    Call("patch_embed", x, torch.randn(24, 40, 3, 2) / 15, *none).check()


STRIDED = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every-second-channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every-second-column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:, :1, :1].expand_as(x),
}


@shared
@pytest.mark.parametrize("stride", STRIDED)
def test_any_strides(make: Callable[[], Call], stride: str) -> None:
    call = make()
    x, weight, *rest = call.arguments
    strided = [a[:, None].expand(-1, 2)[:, 1] if isinstance(a, Tensor) else a for a in rest]
    weight = weight.repeat_interleave(2, 0)[::2]
    call.arguments = (STRIDED[stride](x), weight, *strided)
    assert not call.arguments[0].is_contiguous()
    call.check()


@shared
def test_batch_of_none(make: Callable[[], Call]) -> None:
    call = make()
    x, *rest = call.arguments
    expected = call.run(x, *rest)
    assert call.run(x[:0], *rest).shape == (0, *expected.shape[1:])


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
        from tests import test_cpu_backend
        torch.set_num_threads(4)
        test_cpu_backend.SHARED["pointwise"]().check()
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinities(activation: str) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, -1e20])
    for make, channels in ((depthwise, (6, 9, 9, 3)), (pointwise, (6, 9, 9, 5))):
        call = make(1, *channels, activation=activation)
        x = call.arguments[0]
        x[0, torch.arange(6), torch.arange(6), 8 - torch.arange(6)] = special
        if make is pointwise:  # each special value alone, in its own position
            call.check()
            continue
        # 3e38 times a weight may overflow in float32 only: compare where neither did.
        out, expected = call(), call.expected()
        fits = expected.abs() < 1e30
        torch.testing.assert_close(
            out.double()[fits], expected[fits], **TOL[torch.float32], equal_nan=True
        )
        assert torch.equal(out.isnan(), expected.isnan())


def test_special_values_of_activations() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -3e38, 3e38])
    x = x.repeat(7).view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1)
    for activation, function in reference.ACTIVATIONS.items():
        expected = function(x.double()).float()
        out = cpu.pointwise_block_cpu(x, one, None, None, None, activation)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-7, equal_nan=True)
        out = cpu.depthwise_block_cpu(x, one, None, None, None, activation, False)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-7, equal_nan=True)


def test_padding_does_not_read_neighbours() -> None:
    call = depthwise(2, 6, 9, 9, 7)
    x = call.arguments[0]
    x[:, ::2] = float("nan")
    out = call.check()
    assert out[:, ::2].isnan().all()
    assert not out[:, 1::2].isnan().any()


def test_pixels_beyond_the_last_patch_are_not_read() -> None:
    call = patch(2, 3, 31, 20, 13, 7, 6)
    x = call.arguments[0]
    x[:, :, 28:] = float("nan")
    x[:, :, :, 18:] = float("nan")
    assert not call.check().isnan().any()


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


# Keyword arguments that are valid, but for what a test replaces.
PACKED = {"packed": (64, 64, 64, 64, 0)}
CALL = {"x": 64, "out": 64, "images": 1, "height": 8, "width": 8, "threads": 1}
ARGUMENTS = {
    "pack": {"matrix": 64, "rows": 1, "depth": 1, "lanes": 1, "packed": 64, "threads": 1},
    "depthwise_block": PACKED | CALL | {"channels": 1, "kernel_size": 3, "residual": False},
    "product_block": PACKED | CALL | {"channels": 1, "channels_out": 1, "patch_h": 2, "patch_w": 2},
}
REFUSALS = [
    ("pack", {"matrix": 0}, "matrix has the address 0"),
    ("pack", {"packed": 0}, "packed has the address 0"),
    ("pack", {"rows": 0}, "rows must be at least 1, got 0"),
    ("pack", {"depth": 0}, "depth must be at least 1, got 0"),
    ("pack", {"lanes": 0}, "lanes must be at least 1, got 0"),
    ("depthwise_block", {"kernel_size": 4}, "kernel_size must be odd, got 4"),
    ("depthwise_block", {"kernel_size": -1}, "kernel_size must be at least 1, got -1"),
    ("depthwise_block", {"channels": 0}, "channels must be at least 1, got 0"),
    ("depthwise_block", {"x": 0}, "x has the address 0"),
    ("depthwise_block", {"threads": 0}, "threads must be at least 1, got 0"),
    ("depthwise_block", {"height": 0}, "height must be at least 1, got 0"),
    ("depthwise_block", {"packed": (0, 64, 64, 64, 0)}, "weight has the address 0"),
    ("product_block", {"packed": (64, 0, 64, 64, 0)}, "bias has the address 0"),
    ("product_block", {"packed": (64, 64, 0, 64, 0)}, "scale has the address 0"),
    ("product_block", {"packed": (64, 64, 64, 0, 0)}, "shift has the address 0"),
    ("product_block", {"packed": (64, 64, 64, 64, 4)}, "activation must be 0 .*, got 4"),
    ("product_block", {"packed": (64, 64, 64, 64, -1)}, "activation must be 0 .*, got -1"),
    ("product_block", {"images": 0}, "images must be at least 1, got 0"),
    ("product_block", {"out": 0}, "out has the address 0"),
    ("product_block", {"channels": 0}, "channels must be at least 1, got 0"),
    ("product_block", {"patch_w": 0}, "patch_w must be at least 1, got 0"),
    ("product_block", {"patch_h": 9}, "height must be at least 9, got 8"),
    ("product_block", {"channels_out": 0}, "channels_out must be at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("function", "replaced", "message"), REFUSALS, ids=[message for *_, message in REFUSALS]
)
def test_impossible_arguments(function: str, replaced: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(_C, function)(**(ARGUMENTS[function] | replaced))


def test_strassen_of_odd_blocks_is_refused() -> None:
    packed = (64, 64, 64, 64, 0)
    trunk = _C.Trunk(packed, 3, 1, 1, 48)
    with pytest.raises(ValueError, match="whole pairs of blocks and panels, got 48 and 64"):
        trunk.add_layer(packed, 3, packed, 64, True)
