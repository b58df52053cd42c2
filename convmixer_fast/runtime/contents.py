"""Whether tensors hold what they held when something was made of them.

Noticed are changes in place that PyTorch counts, and on a CPU also most that it does not count,
such as ``weight.data.mul_(2)`` or a write through NumPy, where that touches one of :data:`SAMPLES`
numbers of a tensor: writes to whole tensors do, but one to few elements rarely does. A GPU's memory
is not read: the host would have to wait for it.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

from torch import Tensor

from convmixer_fast.runtime import backends

__all__ = ["SAMPLES", "counts", "samples"]

SAMPLES = 4
"""Numbers of each tensor that are compared at every call."""


def counts(tensors: Sequence[Tensor]) -> list[int]:
    """Return addresses, and counts of changes in place, which inference tensors do not have."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    return addresses + [tensor._version for tensor in tensors if not tensor.is_inference()]


def samples(tensors: Sequence[Tensor]) -> backends.MemorySamples | None:
    """Return a few numbers of each tensor, to be compared while all are alive at their addresses.

    None without the extension, and where one is not on the CPU.
    """
    make = backends.memory_samples()
    if make is None or any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    return make(*map(list, zip(*chain.from_iterable(map(_sampled, tensors)), strict=True)))


def _sampled(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yield addresses and sizes of the numbers that are compared."""
    count, size = tensor.numel(), tensor.element_size()
    for index in range(min(SAMPLES, count)):
        # By the golden ratio, and so at no regular distance: the corners of kernels may be zeros.
        rest, at = int((index + 1) * 0.6180339887 % 1 * count), tensor.data_ptr()
        for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            rest, position = divmod(rest, length)
            at += position * stride * size
        yield at, size
