"""Does a backend compute on this machine what the original does? Asked before it serves.

A kernel that a compiler or a driver gets wrong is wrong by far more than rounding: one small input
tells, of odd sizes so that every border is there.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convmixer_fast.accuracy import LIMITS, exact, ieee_float32, relative_error
from convmixer_fast.choices import BackendName
from convmixer_fast.errors import MismatchError
from convmixer_fast.runtime import backends
from convmixer_fast.runtime.fused import FusedConvMixer
from convmixer_fast.support.files import write_whole

__all__ = ["SelfCheck", "ensure", "self_check"]

_log = logging.getLogger(__name__)
_SIZES = ((13, 17), (5, 9), (16, 16), (8, 8), (32, 32))
"""Heights and widths tried, in patches; then, for models of one size, in pixels:"""
_PIXELS = (224, 32, 384, 256)
_INT8_LIMIT = 2e-2
"""An input that lies between two steps may be rounded to the other one."""


@dataclass(frozen=True)
class SelfCheck:
    """What a backend computed, compared with the original in float64."""

    backend: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the images."""
    error: float
    """Largest difference over the largest output."""
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; a NaN is not."""
        return self.error <= self.limit

    def __str__(self) -> str:
        """Return one sentence with the numbers."""
        return (
            f"the backend {self.backend!r} on {self.device} is off by {self.error:.1e} of the "
            f"largest output ({self.dtype}, images {self.shape}), and may be off by "
            f"{self.limit:.0e}"
        )


def self_check(
    fused: FusedConvMixer, model: nn.Module, backend: BackendName, example: Tensor | None
) -> SelfCheck:
    """Run ``fused`` on a small random input, and the model in float64.

    Args:
        fused: the optimized module.
        model: what it was made from. Of a module in 8-bit numbers, it is compared with what these
            mean, as the model itself is farther away.
        backend: that ``fused`` will run on.
        example: an input batch, where the model takes no others.

    Raises:
        ValueError: the model takes none of the sizes tried: ``example_input`` is needed.
    """
    stem: Any = fused.stem
    device, dtype = stem.weight.device, stem.dtype
    truth, limit = exact(model), LIMITS.get(dtype, LIMITS[torch.float32])
    if fused.quantization is not None:
        truth, limit = FusedConvMixer(fused.folded(), "reference"), _INT8_LIMIT
    with torch.inference_mode(), ieee_float32():
        x = _input(fused, example)
        found = fused(x)
        wide = x.double() if x.is_floating_point() and fused.quantization is None else x
        error = relative_error(found, truth(wide))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return SelfCheck(backend, name, dtype, tuple(x.shape), error, limit)


def _input(fused: FusedConvMixer, example: Tensor | None) -> Tensor:
    stem: Any = fused.stem
    random = torch.Generator().manual_seed(0)
    if example is not None:
        x = example[:2]
        if x.is_floating_point():
            x = torch.randn(x.shape, generator=random).to(x.dtype)
        return x.to(stem.weight.device)
    for height, width in _candidates(stem.weight.shape[2:]):
        if all(condition.holds(2, height, width) for condition in fused.conditions):
            shape = [2, fused.in_chans, height, width]
            if fused.input_layout == "NHWC":
                shape = [2, height, width, fused.in_chans]
            return torch.randn(shape, generator=random).to(stem.weight.device, stem.dtype)
    said = ", ".join(condition.text for condition in fused.conditions)
    raise ValueError(
        f"the model takes images of some sizes alone ({said}): give verify=True an example_input"
    )


def _candidates(patch: tuple[int, int]) -> Iterator[tuple[int, int]]:
    for rows, columns in _SIZES:
        yield rows * patch[0], columns * patch[1]
    for side in _PIXELS:
        yield side, side


def ensure(fused: FusedConvMixer, model: nn.Module, example: Tensor | None, *, once: bool) -> None:
    """Check ``fused``; where its backend is wrong and was not asked for by name, use another.

    Args:
        fused: the optimized module; changed so.
        model: what it was made from.
        example: see :func:`self_check`.
        once: whether one check that passed is enough for such a model on such a machine.

    Raises:
        MismatchError: the backend named is wrong, or all are.
        ValueError: see :func:`self_check`; where one check is enough, that is logged.
    """
    stem: Any = fused.stem
    device, dtype = stem.weight.device, stem.dtype
    path = _file(fused) if once else None
    if path is not None and path.is_file():
        return
    named = fused.backend
    chosen = backends.resolve(named, device, dtype)
    try:
        found = self_check(fused, model, chosen, example)
    except (ValueError, TypeError, RuntimeError) as error:
        if not once:
            raise
        # Nobody asked: what the check needs, a size or float64, the model may not have.
        _log.warning("the backend %r could not be checked: %s", chosen, error)
        return
    if found.passed:
        _log.info("checked: %s", found)
        if path is not None:
            _keep(found, path)
        return
    wrong = found
    if named == "auto":
        others = backends.BACKENDS[backends.BACKENDS.index(chosen) + 1 :]
        for other in others:
            if backends.why_not(other, device, dtype) is None:
                fused.use_backend(other)
                if self_check(fused, model, other, example).passed:
                    warnings.warn(
                        f"{wrong}: {other!r} takes its place. Please report this, with the output "
                        "of convmixer-fast info",
                        RuntimeWarning,
                        stacklevel=3,
                    )
                    return
    raise MismatchError(
        f"{wrong}; backend='reference' runs on plain PyTorch. Please report this, with the output "
        "of convmixer-fast info"
    )


def _file(fused: FusedConvMixer) -> Path:
    """Return the file that says that such a module was right on such a machine.

    It is named by device, driver, versions, the kernels' sources and the model's shapes: a module
    of other shapes has other machine code.
    """
    # Needs Triton, which is there where there is a GPU to ask about.
    from convmixer_fast.runtime.tuning import cache_folder, environment

    stem: Any = fused.stem
    shapes = sorted({str((tuple(p.shape), p.dtype)) for p in fused.parameters()})
    activations = sorted({str(getattr(module, "activation", "")) for module in fused.modules()})
    key = {**environment(stem.weight.device), "shapes": shapes, "activations": activations}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / f"checked-{name}.json"


def _keep(found: SelfCheck, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"found": str(found)}).encode())
    except OSError as error:
        _log.warning("that a backend was checked is not kept: %s", error)
