"""Arguments of the Triton launchers, and the check of a result: for the tests of the kernels."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from convmixer_fast import reference
from convmixer_fast.activations import ACTIVATIONS
from tests.sweeps import sparse
from tests.tolerances import TOL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BAND = 64

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
few_activations = pytest.mark.parametrize("activation", sparse(ACTIVATIONS, "gelu".__eq__))
"""For what does not depend on the activation."""


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    buffers: list[tuple[Tensor, int]] = []

    def poisoned_empty(shape: tuple[int, ...], **options: object) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * BAND,), float("nan"), **options)
        buffers.append((buffer, size))
        return buffer[BAND : BAND + size].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    yield
    for buffer, size in buffers:
        assert buffer[:BAND].isnan().all()
        assert buffer[BAND + size :].isnan().all()


def random(*shape: int, dtype: torch.dtype, fan_in: int = 1) -> Tensor:
    return (torch.randn(shape) / fan_in**0.5).to(DEVICE, dtype)


def make_vectors(
    channels: int, dtype: torch.dtype = torch.float32, present: str = "bst"
) -> tuple[Tensor | None, ...]:
    """Bias, scale and shift; None for those whose letter is not in ``present``."""
    return tuple(random(channels, dtype=dtype) if name in present else None for name in "bst")


def depthwise_args(
    shape: tuple[int, ...], kernel_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    weight = random(shape[1], 1, kernel_size, kernel_size, dtype=dtype, fan_in=kernel_size**2)
    return random(*shape, dtype=dtype), weight


def pointwise_args(
    shape: tuple[int, ...], channels_out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    weight = random(channels_out, shape[1], 1, 1, dtype=dtype, fan_in=shape[1])
    return random(*shape, dtype=dtype), weight


def check(launcher: Callable[..., Tensor], *args: object) -> Tensor:
    """Run a launcher and compare its result with the reference in float64."""
    ref = getattr(reference, launcher.__name__.replace("_triton", "_ref"))
    x = args[0]
    assert isinstance(x, Tensor)
    exact = ref(*(a.cpu().double() if isinstance(a, Tensor) else a for a in args))
    out = launcher(*args)
    assert out.dtype == x.dtype
    assert out.device == x.device
    assert out.is_contiguous()
    # Rounded to the dtype, so that what overflows there is an infinity on both sides.
    expected = torch.where(exact.to(x.dtype).isinf(), exact.to(x.dtype).double(), exact)
    torch.testing.assert_close(
        out.cpu().double(), expected, **TOL[x.dtype], equal_nan=bool(exact.isnan().any())
    )
    return out


TF32_ERROR = 1e-2
"""TF32 keeps 10 bits of each operand. Of 256 products in a sum of unit variance, simulated, the
worst error is 1.5e-3 with rounded operands, 3.7e-3 with truncated ones."""
