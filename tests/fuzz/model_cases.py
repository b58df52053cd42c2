"""Random ConvMixers, optimized for the CPU: near to float64, and the same bits whatever is beside.

Statistics of BatchNorm and scales of channels vary by orders of magnitude, as trained ones do.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from convmixer_fast import ConvMixer, optimize
from convmixer_fast.accuracy import LIMITS, relative_error
from convmixer_fast.activations import ACTIVATIONS

__all__ = ["ModelCase", "check_determinism", "check_model", "model_cases"]

_ULPS = 16
"""Of float32, or of the input's dtype: what an error may be where eager's happens to be small."""


@dataclass(frozen=True)
class ModelCase:
    """A model and its images; weights and pixels follow from the seed."""

    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    in_chans: int
    num_classes: int
    activation: str
    pool: str
    dtype: torch.dtype
    images: int
    size: tuple[int, int]
    channels_last: bool
    spread: float
    """By how many powers of ten the channels' scales vary, at most."""
    threads: int
    seed: int


@st.composite
def model_cases(draw: Any) -> ModelCase:
    """Make a model and the shape of its images."""
    patch = draw(st.integers(1, 7))
    return ModelCase(
        draw(st.sampled_from((1, 3, 8, 16, 24, 31, 64, 100, 256))),
        draw(st.integers(1, 3)),
        draw(st.sampled_from((1, 3, 5, 7, 9))),
        patch,
        draw(st.sampled_from((1, 3, 4))),
        draw(st.sampled_from((0, 1, 2, 10, 33))),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
        draw(st.sampled_from(("avg", "max", "avgmax"))),
        draw(st.sampled_from((torch.float32, torch.float32, torch.float16, torch.bfloat16))),
        draw(st.integers(0, 5)),
        (patch * draw(st.integers(1, 17)) + patch // 2, patch * draw(st.integers(1, 17))),
        draw(st.booleans()),
        draw(st.sampled_from((0.0, 1.0, 3.0))),
        draw(st.integers(1, 4)),
        draw(st.integers(0, 2**32 - 1)),
    )


def check_model(case: ModelCase) -> None:
    """Compare with float64: at most twice as far off as the original.

    Raises:
        AssertionError: it is farther.
    """
    model, x = _made(case)
    fast = optimize(model, backend="cpu")
    with torch.inference_mode():
        truth = copy.deepcopy(model).double()(x.double())
        result = fast(x)
        assert result.shape == truth.shape
        assert result.dtype == case.dtype
        if not truth.numel() or truth.abs().max() > 0.9 * torch.finfo(case.dtype).max:
            return
        eager = relative_error(model(x), truth)
        if not math.isfinite(eager):  # an activation is beyond float16, and ours are in float32
            eager = LIMITS[case.dtype]
        ours = relative_error(result, truth)
    assert ours <= 2 * eager + _ULPS * torch.finfo(case.dtype).eps, f"{ours:.2e}, eager {eager:.2e}"


def check_determinism(case: ModelCase) -> None:
    """An image's result is the same bits alone, among others, and on any number of threads.

    Of a head that PyTorch runs, whose products of matrices go by the batch, the maps that it reads.

    Raises:
        AssertionError: a bit differs.
    """
    model, x = _made(case)
    optimized: Any = optimize(model, backend="cpu")
    fast = optimized if case.pool == "avg" else optimized.forward_features
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            expected = fast(x)
            torch.set_num_threads(case.threads)
            assert torch.equal(fast(x), expected), f"{case.threads} threads"
            for index in range(len(x)):
                alone = fast(x[index : index + 1])[0]
                assert torch.equal(alone, expected[index]), f"image {index} alone"
            assert torch.equal(fast(x.flip(0)).flip(0), expected), "in another order"
    finally:
        torch.set_num_threads(before)


def _made(case: ModelCase) -> tuple[nn.Module, Tensor]:
    model = ConvMixer(
        case.dim,
        case.depth,
        kernel_size=case.kernel_size,
        patch_size=case.patch_size,
        in_chans=case.in_chans,
        num_classes=case.num_classes,
        global_pool=case.pool,
        act_layer=ACTIVATIONS[case.activation].layer,
    ).eval()
    random = torch.Generator().manual_seed(case.seed)

    def powers(like: Tensor) -> Tensor:
        return 10 ** (case.spread * (torch.rand(like.shape, generator=random) - 0.5))

    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=random) / fan_in**0.5)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.copy_(torch.randn(norm.num_features, generator=random))
                norm.running_var.copy_(powers(norm.running_var) ** 2)
                norm.weight.mul_(powers(norm.weight))
    x = torch.randn(case.images, case.in_chans, *case.size, generator=random)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return model.to(case.dtype), x.to(case.dtype)
