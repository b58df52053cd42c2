"""What the launchers of this package share: device, offsets, vectors, modes.

Nothing here runs at import. The launchers trust their arguments, which
:mod:`convmixer_fast.ops` has checked.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INT32_ELEMENTS", "Epilogue", "capability", "device_guard", "fp32_input_precision"]
__all__ += ["is_interpreted", "offset_dtype", "takes_ptx"]

INT32_ELEMENTS = 2**31
"""From this span on, element offsets need 64 bits."""


def device_guard(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of ``x`` current, so that Triton launches there on its current stream."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def is_interpreted(kernel: Callable[..., Any]) -> bool:
    """Whether ``kernel`` runs in Triton's interpreter.

    Triton decides that by ``triton.knobs.runtime.interpret`` when it decorates the
    kernel, so the kernel, and not the present value of the switch, has the answer.
    """
    return not isinstance(kernel, triton.JITFunction)


def takes_ptx(kernel: Callable[..., Any]) -> bool:
    """Whether ``kernel`` is compiled for an NVIDIA device, with inline PTX allowed."""
    return not is_interpreted(kernel) and torch.version.hip is None


def capability(x: Tensor) -> int:
    """Return the compute capability of the device of ``x``, 90 for 9.0.

    On an AMD device and in the interpreter that of the oldest supported device: what every
    device has, and nothing else.
    """
    if not x.is_cuda or torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


class Epilogue(NamedTuple):
    """What follows a sum: ``act(sum + bias) * scale + shift``."""

    bias: Tensor | None
    """(C,), dtype of x or fp32; None for 0."""
    scale: Tensor | None
    """As bias; None for 1."""
    shift: Tensor | None
    """As bias; None for 0."""
    activation: str
    """A name of :data:`convmixer_fast.reference.ACTIVATIONS`."""

    def vectors(self) -> tuple[Tensor | None, ...]:
        """Return bias, scale and shift as the kernels read them, with stride 1."""
        return tuple(
            None if vector is None else vector.contiguous()
            for vector in (self.bias, self.scale, self.shift)
        )


def offset_dtype(*spans: int) -> tl.dtype:
    """Return int32 if all ``spans`` of elements can be addressed with it, else int64."""
    return tl.int64 if max(spans) >= INT32_ELEMENTS else tl.int32


def fp32_input_precision() -> str:
    """Return ``"tf32"`` or ``"ieee"`` for float32 products: what eager convolution would use.

    PyTorch's newer switch is read: it also shows what was set through the older
    ``torch.backends.cudnn.allow_tf32``, whereas reading the older one raises once the
    newer ones were set.
    """
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if precision == "tf32" else "ieee"
