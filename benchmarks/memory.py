"""How much a cache holds, and how much memory a call takes."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["cache_bytes", "peak_memory"]

_MOST_CPU_CACHE = 64 * 2**20


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory.

    A virtual machine may report all of a server's; no more than 64 MiB are believed.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        found = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (OSError, ValueError):
        found = 0
    return min(found, _MOST_CPU_CACHE) if found > 0 else _MOST_CPU_CACHE // 2


def peak_memory(
    device: torch.device, call: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, int | None]:
    """Call ``call(x)`` and return its result, and the most memory that it took, in bytes.

    On a GPU what PyTorch's allocator gave out besides what was in use before; a runtime with
    an allocator of its own is not seen. On a CPU the growth of the resident memory over the
    call, where Linux lets a process reset its peak; None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        out = call(x)
        torch.cuda.synchronize(device)
        return out, torch.cuda.max_memory_allocated(device) - before
    if not _reset_resident_peak():
        return call(x), None
    before = _resident("VmRSS")
    out = call(x)
    return out, max(0, _resident("VmHWM") - before)


def _reset_resident_peak() -> bool:
    # What freed memory glibc keeps would be used again by the call and not be seen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")
