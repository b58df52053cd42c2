"""Which backends there are, which can run here, and where one cannot, why.

One function, :func:`why_not`, both selects a backend and explains a refusal, so
that what :func:`backend_info` reports is what the ops do. Nothing here runs at
import: a device is queried when an op runs or the user asks.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from convmixer_fast.choices import BackendName
from convmixer_fast.errors import BackendUnavailableError

__all__ = ["BACKENDS", "Backend", "BackendStatus", "MemorySamples", "backend_info", "launcher"]
__all__ += [
    "bfloat16_pays",
    "cpu_rates",
    "memory_samples",
    "resolve",
    "row",
    "trunk_maker",
    "why_not",
]

_PACKAGE = Path(__file__).resolve().parent.parent
_WORTHWHILE = 1.3
_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BackendStatus:
    """One row of :func:`backend_info`."""

    name: str
    live: bool
    """Whether the backend can run on at least one device of this machine."""
    detail: str
    """What it runs on when live, otherwise why it cannot."""


def why_not(backend: BackendName, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why ``backend`` cannot run tensors of ``dtype`` on ``device``; None when it can.

    Args:
        backend: one of :data:`BACKENDS`.
        device: where the tensors live.
        dtype: their dtype.

    Raises:
        ValueError: there is no backend of that name.
    """
    if backend not in _BACKENDS:
        raise ValueError(
            f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )
    if backend != "reference" and dtype not in _FUSED_DTYPES:
        return f"{dtype} is not supported; use float32, float16 or bfloat16"
    return _BACKENDS[backend].why_not(device)


def resolve(backend: BackendName, device: torch.device, dtype: torch.dtype) -> BackendName:
    """Turn ``backend`` into the name of one that can run ``dtype`` on ``device``.

    ``"auto"`` becomes the first of :data:`BACKENDS` that can; Triton's interpreter,
    which is thousands of times slower than a GPU, must be asked for by name.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: the named backend cannot run; the message says why.
    """
    if backend == "auto":
        for name in BACKENDS:
            interpreted = name == "triton" and device.type == "cpu"
            if not interpreted and why_not(name, device, dtype) is None:
                return name
    reason = why_not(backend, device, dtype)
    if reason is not None:
        raise BackendUnavailableError(
            f"backend {backend!r} cannot run {dtype} on {device}: {reason}. "
            "Use backend='auto' to let the library choose, and "
            "convmixer_fast.backend_info() to see the choices."
        )
    return backend


def launcher(op: str, backend: BackendName) -> Callable[..., Tensor]:
    """Return the function with which ``backend`` (already resolved) runs ``op``."""
    row = _BACKENDS[backend]
    module = importlib.import_module(row.module)
    function: Callable[..., Tensor] = getattr(module, f"{op}_{row.suffix}")
    return function


def trunk_maker(backend: BackendName) -> Callable[..., Callable[..., Tensor]] | None:
    """Return what makes a whole trunk of folded blocks for ``backend`` (already resolved).

    None where the backend has the ops alone; see :class:`engine.Engine`.
    """
    row = _BACKENDS[backend]
    if row.trunk is None:
        return None
    maker: Callable[..., Callable[..., Tensor]] = getattr(
        importlib.import_module(row.module), row.trunk
    )
    return maker


def row(backend: BackendName) -> "Backend":
    """Return the row of ``backend`` (already resolved)."""
    return _BACKENDS[backend]


def memory_samples() -> Callable[[list[int], list[int]], "MemorySamples"] | None:
    """Return what compares pieces of memory with what they held; None without the extension."""
    module, _ = _load_extension()
    make: Callable[[list[int], list[int]], MemorySamples] | None = getattr(module, "Samples", None)
    return make


def cpu_rates(threads: int) -> dict[str, float]:
    """Measure how many operations a second this CPU does at most, in registers.

    Returns:
        Multiplications and additions of so many threads, by the name of what they compute with:
        ``"float32"``, ``"int8"``, and ``"bfloat16"`` where there are instructions for it. Empty
        without the extension.
    """
    module, _ = _load_extension()
    return {} if module is None else dict(module.rates(threads))


@cache
def bfloat16_pays() -> bool:
    """Whether products of bfloat16 are faster than of float32 on this CPU: measured, once.

    Zen 4 and Zen 5 do them at twice the rate of float32, Intel's processors at half of it.
    """
    rates = cpu_rates(1)
    return rates.get("bfloat16", 0.0) > _WORTHWHILE * rates.get("float32", 0.0)


class MemorySamples(Protocol):
    """Pieces of memory, and what they held."""

    def unchanged(self) -> bool:
        """Whether they still hold that."""


def backend_info() -> tuple[BackendStatus, ...]:
    """Report every backend: whether it is live on this machine, on what, or why not.

    This queries CUDA, and loads the compiled extension, when called.
    """
    return tuple(row.status() for row in _BACKENDS.values())


@cache
def _load_extension() -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec("convmixer_fast._C") is None:
        hidden = _hidden_installation()
        if hidden is not None:
            return None, (
                f"the folder {_PACKAGE} has no compiled extension, and hides the installed package "
                f"{hidden}, which has one; start Python elsewhere, or install this folder with "
                "pip install -e ."
            )
        return None, (
            "the compiled extension convmixer_fast._C was not built: CONVMIXER_FAST_EXT was 0, or "
            "compiling failed; reinstall with CONVMIXER_FAST_EXT=1 to build it or see why not"
        )
    try:
        return importlib.import_module("convmixer_fast._C"), ""
    except ImportError as error:
        reason = f"the compiled extension failed to load: {error}"
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return None, reason


def _hidden_installation() -> Path | None:
    """Return where the package is installed with its extension, if this one is another copy."""
    for folder in map(Path, sys.path):
        other = folder / "convmixer_fast"
        if other.resolve() != _PACKAGE and any(other.glob("_C.*.so")):
            return other
    return None


@cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'convmixer-fast[triton]'"
    return None


def _interpreting() -> bool:
    # Triton's own switch, read the way Triton reads it.
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _cpu_why_not(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs CPU tensors, and these are on {device}"
    module, reason = _load_extension()
    return None if module is not None else reason


def _triton_why_not(device: torch.device) -> str | None:
    missing = _triton_missing()
    if missing is not None:
        return missing
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or newer, and {device} has {major}.{minor}"
        return None
    if device.type == "cpu" and _interpreting():
        return None
    return (
        f"it runs CUDA tensors, and these are on {device} "
        "(TRITON_INTERPRET=1 interprets the kernels on a CPU, slowly, for tests)"
    )


def _cpu_status() -> BackendStatus:
    module, reason = _load_extension()
    if module is None:
        return BackendStatus("cpu", False, reason)
    narrow = "float16 is" if bfloat16_pays() else "float16 and bfloat16 are"
    return BackendStatus(
        "cpu",
        True,
        f"{module.isa()} kernels, {torch.get_num_threads()} threads (torch.get_num_threads()); "
        f"{narrow} computed in float32",
    )


def _triton_status() -> BackendStatus:
    missing = _triton_missing()
    if missing is not None:
        return BackendStatus("triton", False, missing)
    if not torch.cuda.is_available():
        reason = _triton_why_not(torch.device("cpu"))
        if reason is None:
            return BackendStatus("triton", True, "interpreted on the CPU (slow, for tests)")
        return BackendStatus("triton", False, "no CUDA device: torch.cuda.is_available() is False")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    reasons = [_triton_why_not(device) for device in devices]
    live = [
        torch.cuda.get_device_name(d) for d, r in zip(devices, reasons, strict=True) if r is None
    ]
    if not live:
        return BackendStatus("triton", False, "; ".join(r for r in reasons if r is not None))
    return BackendStatus("triton", True, ", ".join(live))


def _reference_status() -> BackendStatus:
    return BackendStatus("reference", True, "plain PyTorch, any device")


@dataclass(frozen=True)
class Backend:
    """One row of the table: all that the rest of the package knows of a backend."""

    module: str
    """Where its launchers are."""
    suffix: str
    """What their names end with, after the op's."""
    why_not: Callable[[torch.device], str | None]
    """Says why it cannot run tensors on a device; None when it can."""
    status: Callable[[], BackendStatus]
    trunk: str | None = None
    """The class there that runs stem and layers in one call, if there is one."""
    options: tuple[str, ...] = ()
    """What that takes by name: attributes of :class:`fused.FusedConvMixer`."""
    graphs: bool = False
    """Whether its calls can be CUDA graphs."""
    tunes: bool = False
    """Whether :meth:`fused.FusedConvMixer.tune` can measure what suits it."""
    int8: bool = False
    """Whether its trunk runs quantised blocks."""
    packs: bool = False
    """Whether its trunk has copies of the weights, and needs those it was made of no more."""


_BACKENDS: dict[BackendName, Backend] = {
    "triton": Backend(
        "convmixer_fast.kernels",
        "triton",
        _triton_why_not,
        _triton_status,
        trunk="TritonTrunk",
        options=("chunk", "tuned"),
        graphs=True,
        tunes=True,
    ),
    "cpu": Backend(
        "convmixer_fast.runtime.cpu",
        "cpu",
        _cpu_why_not,
        _cpu_status,
        trunk="CpuTrunk",
        int8=True,
        packs=True,
    ),
    "reference": Backend("convmixer_fast.reference", "ref", lambda device: None, _reference_status),
}
BACKENDS = tuple(_BACKENDS)
"""The backends in the order in which ``"auto"`` tries them."""
