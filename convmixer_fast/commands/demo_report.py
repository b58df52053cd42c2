"""What the demo finds: logits and times of the original and of the optimized model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convmixer_fast.accuracy import LIMITS, relative_error
from convmixer_fast.choices import BackendName
from convmixer_fast.errors import MismatchError
from convmixer_fast.support.timing import Timings

__all__ = ["TOLERANCE", "DemoReport", "LogitsComparison"]

TOLERANCE = LIMITS[torch.float32]
"""How far the logits may differ, as a share of the largest of them."""


@dataclass(frozen=True)
class LogitsComparison:
    """Logits of the original and of the optimized model for the same images."""

    original: Tensor
    optimized: Tensor

    @property
    def differing(self) -> int:
        """How many images the two models classify differently."""
        return int((self.original.argmax(1) != self.optimized.argmax(1)).sum())

    @property
    def difference(self) -> float:
        """The largest difference between two logits."""
        return float((self.original - self.optimized).abs().max())

    @property
    def relative_difference(self) -> float:
        """The largest difference as a share of the largest magnitude of the original's logits."""
        return relative_error(self.optimized, self.original)

    def check(self, what: str) -> None:
        """Raise where the two models differ.

        Raises:
            MismatchError: a prediction differs, or a logit by more than :data:`TOLERANCE`.
        """
        # Written so that a NaN does not pass.
        if self.differing or not self.relative_difference <= TOLERANCE:
            raise MismatchError(
                f"{what}: the optimized model should give the original's outputs, but "
                f"{self.differing} of {len(self.original)} predictions differ, and the logits by "
                f"up to {self.relative_difference:.1e} of the largest (allowed {TOLERANCE:.0e}); "
                "please report this with the output of convmixer_fast.backend_info()"
            )


@dataclass(frozen=True)
class DemoReport:
    """What the demo found."""

    backend: BackendName
    """The backend that the optimized models ran on."""
    accuracies: tuple[float, float]
    """Of the original and of the optimized model on the held-out digits, from 0 to 1."""
    digits: LogitsComparison
    photo: LogitsComparison
    timings: dict[str, Timings]
    """By what was timed; the candidates are ``"original"`` and ``"optimized"``."""
    output: Path
    """The picture that was written."""
