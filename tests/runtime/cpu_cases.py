"""Calls of the compiled CPU backend's ops, for the tests of its numbers and of its threads."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "convmixer_fast._C",
    reason="needs the compiled extension: CONVMIXER_FAST_EXT=1 pip install .",
)

from convmixer_fast import reference
from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.runtime import cpu
from tests.paths import ROOT
from tests.tolerances import TOL

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
    names = list(ACTIVATIONS)
    for i, (make, shape) in enumerate(CASES.values()):
        make(*shape, activation=names[i % len(names)]).check()
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
    expected = ACTIVATIONS[activation].function(x.double())
    return (out.double() - expected).abs().max().item()


def check_threads(trunk: Callable[..., Tensor], x: Tensor) -> None:
    """Compare features computed by several numbers of threads, and those of an image alone."""
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outs += [trunk(x, "features") for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)
    # Nor do they depend on the images beside it.
    assert torch.equal(trunk(x[-1:], "features"), outs[0][-1:])


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
