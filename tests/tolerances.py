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

# Whole models: largest difference from the float64 model with unrounded weights, over its largest
# output. Interpreted, worst of test_triton_models.py: float32 2.4e-7 (margin 4), float16
# 8.6e-4 (margin 2; eager's own 8.7e-4), bfloat16 2.6e-2 (margin 1.5; eager's own 7.8e-3: the
# interpreter truncates to bfloat16 instead of rounding, always towards 0, and layers add up).
# On a device an error is besides held to twice eager's.
MODEL_TOL: dict[torch.dtype, float] = {
    torch.float32: 1e-6,
    torch.float16: 1.7e-3,
    torch.bfloat16: 4e-2,
}
