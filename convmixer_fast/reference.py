"""The reference of each fused op, in plain PyTorch: what the kernels must compute.

Every backend is tested against these functions evaluated in float64. They take
the same arguments as the backends' launchers and do no checking: the public,
checked entry points are in :mod:`convmixer_fast.ops`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer_fast.activations import ACTIVATIONS

__all__ = ["depthwise_block_ref", "patch_embed_ref", "pointwise_block_ref"]


def depthwise_block_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    residual: bool,
) -> Tensor:
    """``act(depthwise_conv(x) + bias) * scale + shift + x``; see :func:`ops.depthwise_block`."""
    channels, _, kernel_size, _ = weight.shape
    y = _conv(x, weight, bias, padding=kernel_size // 2, groups=channels)
    return _epilogue(
        ACTIVATIONS[activation].function(y), scale, shift, x if residual else None, x.dtype
    )


def pointwise_block_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """``act(pointwise_conv(x) + bias) * scale + shift``; see :func:`ops.pointwise_block`."""
    y = ACTIVATIONS[activation].function(_conv(x, weight, bias))
    return _epilogue(y, scale, shift, None, x.dtype)


def patch_embed_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """``act(patch_conv(x) + bias) * scale + shift``; see :func:`ops.patch_embed`."""
    patch = (weight.shape[2], weight.shape[3])
    y = ACTIVATIONS[activation].function(_conv(x, weight, bias, stride=patch))
    return _epilogue(y, scale, shift, None, x.dtype)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int] = (1, 1),
    padding: int = 0,
    groups: int = 1,
) -> Tensor:
    # As in the kernels, 16-bit inputs are computed in float32 and rounded once, at the end.
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(
        x.to(dtype), weight.to(dtype), bias, stride=stride, padding=padding, groups=groups
    )


def _epilogue(
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``y * scale + shift + residual``, in one pass over ``y`` where PyTorch has one."""
    added = None if shift is None else shift[:, None, None].to(y.dtype)
    if residual is not None:
        added = residual.to(y.dtype) if added is None else residual + added
    if scale is not None:
        factor = scale[:, None, None].to(y.dtype)
        y = y * factor if added is None else torch.addcmul(added, y, factor)
    elif added is not None:
        y = y + added
    return y.to(dtype).contiguous()
