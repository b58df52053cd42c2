"""The one table of tolerances, for ``torch.testing.assert_close(..., **TOL[dtype])``.

A result is compared with the reference evaluated in float64 from the same rounded
inputs, with sums of about unit variance. "Used" is the largest part of its row that a
measured error took: ``|out - ref| / (atol + rtol * |ref|)``. Kernels accumulate in
float32 and round once, so the 16-bit rows are the rounding of the result and little else.
"""

from typing import Any

import torch

__all__ = ["MODEL_TOL", "TOL"]

TOL: dict[torch.dtype, dict[str, Any]] = {
    # Triton, interpreted: worst error 2.0e-6, used 0.11. The rest, 9 times as much, is for longer
    # sums in another order: 1,536 channels, and the devices' approximate exp and division.
    torch.float32: {"rtol": 5e-6, "atol": 5e-6},
    # Rounding to nearest is at most 2^-11 = 4.9e-4 of the result. Triton, interpreted:
    # worst error 3.5e-3, used 0.47.
    torch.float16: {"rtol": 1e-3, "atol": 1e-4},
    # Rounding to nearest is at most 2^-8 = 3.9e-3 of the result, but Triton's interpreter
    # truncates, which is less than 2^-7 = 7.8e-3. Interpreted: worst error 6.1e-2, used 0.94.
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-3},
}

# Whole models, two layers: largest difference from the float64 model with unrounded weights,
# over its largest output. Interpreted, worst of the published architectures: float32 4.8e-7
# (margin 4), float16 3.8e-4 (margin 2), bfloat16 6.7e-3 (margin 2; the interpreter truncates).
MODEL_TOL: dict[torch.dtype, float] = {
    torch.float32: 2e-6,
    torch.float16: 8e-4,
    torch.bfloat16: 1.4e-2,
}
