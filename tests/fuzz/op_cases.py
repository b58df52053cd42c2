"""Random calls of the fused ops, on every backend, against float64.

A result may be off by what rounding can do to it: sums in float32 by a multiple of the sum of
magnitudes, the rest by units in the last place. What the channels' scales are does not matter.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from convmixer_fast import ops
from convmixer_fast.activations import ACTIVATIONS

__all__ = ["OPS", "OpCase", "check_op", "op_cases"]

OPS = ("depthwise_block", "pointwise_block", "patch_embed")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 23, 31, 33)
_CHANNELS = (1, 2, 3, 7, 8, 16, 17, 31, 48, 64, 97)
_LAYOUTS = ("contiguous", "channels last", "sliced", "transposed", "expanded", "offset")
_VALUES = ("unit", "wide", "tiny", "huge", "zeros")
_EPSILON = torch.finfo(torch.float32).eps
_STEEPEST = 1.5
"""Of any activation: Hardswish at 3."""


@dataclass(frozen=True)
class OpCase:
    """A call; its tensors follow from the seed."""

    op: str
    backend: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int]
    activation: str
    layout: str
    values: str
    given: tuple[bool, bool, bool]
    """Whether there are bias, scale and shift."""
    residual: bool
    planted: float | None
    """A number that is none, at one place of the input."""
    seed: int

    @property
    def groups(self) -> int:
        return self.shape[1] if self.op == "depthwise_block" else 1


@st.composite
def op_cases(draw: Any, op: str, backend: str) -> OpCase:
    """Make a call of ``op``; for an interpreted backend, a small one."""
    small = backend == "triton"
    sizes, channels = (_SIZES[:6], _CHANNELS[:6]) if small else (_SIZES, _CHANNELS)
    patch = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    side = draw(st.sampled_from((1, 3, 5, 7, 9, 11)))
    kernel = {"depthwise_block": (side, side), "pointwise_block": (1, 1), "patch_embed": patch}[op]
    height, width = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    if op == "patch_embed":
        height, width = height + patch[0] - 1, width + patch[1] - 1
    c = draw(st.sampled_from(channels))
    return OpCase(
        op,
        backend,
        draw(st.sampled_from(_DTYPES)),
        (draw(st.integers(0, 3)), c, height, width),
        c if op == "depthwise_block" else draw(st.sampled_from(channels)),
        kernel,
        draw(st.sampled_from(sorted(ACTIVATIONS))),
        draw(st.sampled_from(_LAYOUTS)),
        draw(st.sampled_from(_VALUES)),
        (draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
        draw(st.booleans()),
        draw(st.sampled_from((None, None, float("nan"), float("inf"), float("-inf")))),
        draw(st.integers(0, 2**32 - 1)),
    )


def check_op(case: OpCase) -> None:
    """Run the call, and check every number of its result.

    Raises:
        AssertionError: one is wrong.
    """
    x, weight, vectors = _tensors(case)
    options = {"residual": case.residual} if case.op == "depthwise_block" else {}
    result = getattr(ops, case.op)(
        x, weight, *vectors, activation=case.activation, backend=case.backend, **options
    )
    truth, bound, seen = _truth(case, x.double(), weight.double(), vectors)
    assert result.shape == truth.shape
    assert result.dtype == case.dtype
    assert result.is_contiguous()
    if case.backend == "triton" and case.planted is not None:
        return  # tensor cores spread it, as the op's documentation says
    if case.planted != case.planted:
        assert result[seen].isnan().all(), "a NaN is lost"
    # The largest numbers of a dtype may be rounded to infinity.
    sure = ~seen & (truth.abs() + bound < 0.999 * torch.finfo(case.dtype).max)
    off = (result.double() - truth).abs()
    wrong = sure & ~(off <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} are off, by up to "
        f"{float((off / bound)[wrong].nan_to_num(float('inf')).max()):.3g} times the bound"
    )


def _truth(
    case: OpCase, x: Tensor, weight: Tensor, vectors: list[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result in float64, how far off each number may be, and which see a plant."""
    depthwise = case.op == "depthwise_block"
    options: dict[str, Any] = {"groups": case.groups}
    if depthwise:
        options["padding"] = case.kernel[0] // 2
    if case.op == "patch_embed":
        options["stride"] = case.kernel
    bias, scale, shift = (v if v is None else v.double()[:, None, None] for v in vectors)
    zero = x.new_zeros(())
    bias, scale, shift = (
        zero if bias is None else bias, zero + 1 if scale is None else scale,
        zero if shift is None else shift,
    )  # fmt: skip
    alien = ~x.isfinite()
    finite = x.masked_fill(alien, 0.0)
    ones = torch.ones_like(weight)
    seen = F.conv2d(alien.double(), ones, **options) > 0.5
    v = F.conv2d(finite, weight, **options) + bias
    magnitude = F.conv2d(finite.abs(), weight.abs(), **options) + bias.abs()
    y = ACTIVATIONS[case.activation].function(v)
    terms = weight[0].numel()
    of_v = (2 * terms**0.5 + 16) * _EPSILON * magnitude
    bound = scale.abs() * (_STEEPEST * of_v + 8 * _EPSILON * v.abs())
    result = y * scale + shift
    bound = bound + 4 * _EPSILON * ((y * scale).abs() + shift.abs())
    if depthwise and case.residual:
        result = result + finite
        bound = bound + 4 * _EPSILON * finite.abs()
        seen = seen | alien
    if case.backend == "triton" and case.activation == "gelu" and case.dtype != torch.float32:
        # A polynomial for results of 16 bits: kernels/activations.py has its error.
        bound = bound + 0.28 * torch.finfo(torch.float16).eps * (y * scale).abs()
    kind = torch.finfo(case.dtype)
    # To nearest; Triton's interpreter cuts bfloat16 off.
    cut_off = case.backend == "triton" and case.dtype == torch.bfloat16
    last = kind.eps if cut_off else kind.eps / 2
    smallest = 2 * kind.tiny * kind.eps + 2 * torch.finfo(torch.float32).tiny * terms
    bound = 1.01 * (bound + last * result.abs()) + smallest * (1 + scale.abs())
    return result, bound, seen


def _tensors(case: OpCase) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    random = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def powers(count: int, most: float) -> Tensor:
        return 10 ** (most * (2 * torch.rand(count, generator=random, dtype=torch.float64) - 1))

    n, c, h, w = case.shape
    x = normal(n, c, h, w)
    weight = normal(case.out_channels, c // case.groups, *case.kernel)
    weight /= weight[0].numel() ** 0.5
    vectors = [normal(case.out_channels) for _ in range(3)]
    short = case.dtype == torch.float16
    if case.values == "wide":
        x *= powers(c, 1 if short else 6)[:, None, None]
        weight *= powers(case.out_channels, 1 if short else 6)[:, None, None, None]
        vectors[1] *= powers(case.out_channels, 1 if short else 6)
    elif case.values == "tiny":
        x *= 1e-6 if short else 1e-38
    elif case.values == "huge":
        x *= 300 if short else 1e18
        weight *= 3 if short else 1e15
    elif case.values == "zeros":
        vectors[1][::2] = 0
        weight[::3] = 0
        x[:, ::2] = 0
    if case.planted is not None and x.numel():
        place = torch.randint(x.numel(), (1,), generator=random)
        x.view(-1)[place] = case.planted
    x = _laid_out(x.to(case.dtype), case.layout)
    kept = [
        vector.to(case.dtype) if given else None
        for vector, given in zip(vectors, case.given, strict=True)
    ]
    return x, weight.to(case.dtype), kept


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return x.repeat_interleave(2, 3)[..., ::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:, :, :, :1].expand(x.shape)
    if layout == "offset":
        flat = torch.empty(x.numel() + 1, dtype=x.dtype)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    return x
