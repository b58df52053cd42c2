"""What was believed before a GPU had run anything: kernels/PREDICTIONS.md says why."""

from collections.abc import Mapping

__all__ = ["KERNELS", "MODELS"]

KERNELS: Mapping[str, float] = {
    "depthwise 768 x 32x32 k7 relu, batch 64": 108e-6,
    "pointwise 768 x 32x32 relu, batch 64": 140e-6,
    "depthwise 1536 x 32x32 k9 gelu, batch 64": 220e-6,
    "pointwise 1536 x 32x32 gelu, batch 64": 560e-6,
    "depthwise 1024 x 16x16 k9 gelu, batch 64": 40e-6,
    "pointwise 1024 x 16x16 gelu, batch 64": 62e-6,
    "depthwise 768 x 32x32 k7 relu, batch 1": 3.5e-6,
    "pointwise 768 x 32x32 relu, batch 1": 6.0e-6,
}
"""Seconds of a kernel on an H100, in float16, by :class:`candidates.Batch` as text."""

MODELS: Mapping[str, float] = {
    "convmixer_768_32, 224 px, batch 64": 8300,
    "convmixer_1536_20, 224 px, batch 64": 4250,
    "convmixer_1024_20_ks9_p14, 224 px, batch 64": 27500,
    "convmixer_768_32, 224 px, batch 1": 2400,
}
"""Images a second of a model there, by the case's name."""
