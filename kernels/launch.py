"""What the launchers of this package share: launches, device, offsets, vectors, modes.

Nothing here runs at import. The launchers trust their arguments, which
:mod:`convmixer_fast.ops` has checked.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "FIRST_SIZE",
    "INT32_ELEMENTS",
    "BoundLaunch",
    "Epilogue",
    "Launch",
    "capability",
    "device_guard",
]
__all__ += ["fp32_input_precision", "is_interpreted", "offset_dtype", "takes_ptx"]

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
    """A name of :data:`convmixer_fast.activations.ACTIVATIONS`."""

    def vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return bias, scale and shift as the kernels read them, with stride 1."""
        return _contiguous(self.bias), _contiguous(self.scale), _contiguous(self.shift)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


class Launch(NamedTuple):
    """One launch of a kernel whose parameters begin with x, weight, bias, scale, shift, out."""

    kernel: Any
    programs: int
    x: Tensor | TensorDescriptor
    weight: Tensor | TensorDescriptor
    epilogue: Epilogue
    out: Tensor
    sizes: tuple[int, ...]
    """The parameters after ``out`` that are not compiled in."""
    constants: Mapping[str, Any]
    """Those that are, by name, and the options of the compiler."""

    def run(self) -> Any:
        """Launch on the current stream of the tensors' device; return what was compiled."""
        vectors = self.epilogue.vectors()
        args = (self.x, self.weight, *vectors, self.out, *self.sizes)
        with device_guard(self.out):
            return self.kernel[(self.programs,)](*args, **self.constants)


class BoundLaunch:
    """A launch to be repeated with other memory, past Triton's search for what it has compiled.

    That search takes Python 25 to 40 us, more than most of these kernels; what is left takes 4,
    and 3 more where operands are described to the TMA.

    Weights, vectors, sizes and what was compiled are kept; so they must stay as they are. The
    memory of x and of the result is not kept.

    Args:
        launch: is not run yet.
    """

    def __init__(self, launch: Launch) -> None:
        # A vector that is not contiguous is copied here, and not at each launch.
        vectors = launch.epilogue.vectors()
        self._weight_and_vectors = (launch.weight, *vectors)
        self._epilogue = Epilogue(*vectors, launch.epilogue.activation)
        self._kernel, self._programs = launch.kernel, launch.programs
        self._sizes, self._constants = launch.sizes, launch.constants
        self._after_out: tuple[Any, ...] = ()
        self._runner: Callable[..., Any] | None = None
        self.description: Description | None = None
        """How the TMA is to see x; None where it is read through pointers."""
        if isinstance(launch.x, TensorDescriptor):
            described = launch.x
            self.description = Description(
                tuple(described.shape), tuple(described.strides), tuple(described.block_shape)
            )

    def __call__(self, x: Tensor | TensorDescriptor, out: Tensor) -> None:
        """Launch on the current stream of the current device, which must be that of the tensors.

        Args:
            x: as in the launch: other memory of the same dtype, aligned to 16 bytes if
                that was; described, if that was.
            out: likewise.
        """
        if self._runner is not None:
            self._runner(x, *self._weight_and_vectors, out, *self._after_out)
            return
        weight = self._weight_and_vectors[0]
        compiled = Launch(
            *(self._kernel, self._programs, x, weight, self._epilogue, out),
            *(self._sizes, self._constants),
        ).run()
        if not is_interpreted(self._kernel):
            # What was compiled takes the parameters that are compiled in, too.
            names = self._kernel.arg_names[FIRST_SIZE + len(self._sizes) :]
            self._after_out = (*self._sizes, *(self._constants[name] for name in names))
            self._runner = compiled[(self._programs, 1, 1)]


FIRST_SIZE = 6
"""Where ``Launch.sizes`` begin among a kernel's parameters."""


class Description(NamedTuple):
    """A tensor as the TMA sees it, but for its memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]

    def of(self, memory: Tensor) -> TensorDescriptor:
        """Return ``memory`` so described."""
        return TensorDescriptor(memory, list(self.shape), list(self.strides), [*self.block_shape])


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
