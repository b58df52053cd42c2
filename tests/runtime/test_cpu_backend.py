"""The numbers of the compiled CPU backend, against the reference in float64.

Each instruction set that the machine has, NaN and infinities, the error of the activations,
tails of every size and any memory format.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from convmixer_fast import _C
from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.runtime import cpu
from tests.runtime.cpu_cases import (
    CASES,
    Call,
    activation_error,
    depthwise,
    patch,
    pointwise,
    run_python,
    shared,
)
from tests.sweeps import sparse
from tests.tolerances import TOL

BAND = 64
ISAS = ("avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "baseline")


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


# The others of this file run what the machine has, one with AVX-512 mostly.
@pytest.mark.parametrize("isa", sparse(ISAS, "baseline".__eq__))
def test_every_isa(isa: str) -> None:
    code = f"""
        from convmixer_fast import _C
        from tests.runtime import cpu_cases, test_cpu_int8, test_cpu_trunk
        assert _C.isa() == {isa!r}
        cpu_cases.check_all_cases()
        test_cpu_trunk.check_all()
        test_cpu_int8.check_all()
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
    for activation, row in ACTIVATIONS.items():
        expected = row.function(x.double()).float()
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
    ("product_block", {"packed": (64, 64, 64, 64, 99)}, "activation must be from 0 to .*, got 99"),
    ("product_block", {"packed": (64, 64, 64, 64, -1)}, "activation must be from 0 to .*, got -1"),
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
