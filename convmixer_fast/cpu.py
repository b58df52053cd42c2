"""The CPU backend: each op as one call of the compiled extension.

The functions have the signatures of :mod:`convmixer_fast.reference` and trust their
arguments, which :mod:`convmixer_fast.ops` has checked. The kernels work on contiguous
float32 tensors: 16-bit tensors are converted, computed in float32, and the result is rounded
once. They run on ``torch.get_num_threads()`` threads; the result does not depend on how many.
"""

import torch
from torch import Tensor

from convmixer_fast import _C

__all__ = ["depthwise_block_cpu", "patch_embed_cpu", "pointwise_block_cpu"]

_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2}


def depthwise_block_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    residual: bool,
) -> Tensor:
    """``act(depthwise_conv(x) + bias) * scale + shift + x``; see :func:`ops.depthwise_block`."""
    images, channels, height, width = x.shape
    out = _empty(x.shape)
    if out.numel() > 0:
        inputs = _Inputs(x, weight, bias, scale, shift)
        _C.depthwise_block(
            *inputs.addresses,
            out.data_ptr(),
            images,
            channels,
            height,
            width,
            weight.shape[-1],
            _ACTIVATIONS[activation],
            residual,
            torch.get_num_threads(),
        )
    return out.to(x.dtype)


def pointwise_block_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """``act(pointwise_conv(x) + bias) * scale + shift``; see :func:`ops.pointwise_block`."""
    images, channels, height, width = x.shape
    channels_out = weight.shape[0]
    out = _empty((images, channels_out, height, width))
    if out.numel() > 0:
        inputs = _Inputs(x, weight, bias, scale, shift)
        _C.pointwise_block(
            *inputs.addresses,
            out.data_ptr(),
            images,
            channels,
            height,
            width,
            channels_out,
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
        )
    return out.to(x.dtype)


def patch_embed_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """``act(patch_conv(x) + bias) * scale + shift``; see :func:`ops.patch_embed`."""
    images, channels, height, width = x.shape
    channels_out, _, patch_h, patch_w = weight.shape
    out = _empty((images, channels_out, height // patch_h, width // patch_w))
    if out.numel() > 0:
        inputs = _Inputs(x, weight, bias, scale, shift)
        _C.patch_embed(
            *inputs.addresses,
            out.data_ptr(),
            images,
            channels,
            height,
            width,
            channels_out,
            patch_h,
            patch_w,
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
        )
    return out.to(x.dtype)


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


class _Inputs:
    """Tensors as the kernels take them; alive, and so their addresses valid, as long as this."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> None:
        self._tensors: list[Tensor] = []
        self.addresses = (
            self._address(x),
            self._address(weight),
            self._address(bias),
            self._address(scale),
            self._address(shift),
        )

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        tensor = tensor.to(torch.float32).contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()
