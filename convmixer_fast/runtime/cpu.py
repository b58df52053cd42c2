"""The CPU backend: calls of the compiled extension.

The kernels take float32 tensors: weights in the layout that :class:`packing.Packed` makes, images
and results as PyTorch has them, (N, C, H, W). 16-bit tensors are converted, computed in float32,
and the result is rounded once; products of a trunk in bfloat16 take bfloat16, and sum in float32,
where that is faster. Everything runs on ``torch.get_num_threads()`` threads; results do not depend
on how many.

The functions have the signatures of :mod:`convmixer_fast.reference` and trust their arguments,
which :mod:`convmixer_fast.ops` has checked; what they have packed they keep for the next call with
the same tensors. :class:`CpuTrunk` packs once and runs all layers in one call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from convmixer_fast import _C
from convmixer_fast.runtime.backends import bfloat16_pays
from convmixer_fast.runtime.packing import Packed, kept, to_float32
from convmixer_fast.spec import FoldedBlock, FoldedLayer, Head

__all__ = [
    "CpuTrunk",
    "depthwise_block_cpu",
    "patch_embed_cpu",
    "pointwise_block_cpu",
]

_RESULTS = {"features": 0, "mean": 1, "logits": 2}


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
        packed = kept(Packed.depthwise, weight, bias, scale, shift, activation)
        source = to_float32(x)
        _C.depthwise_block(
            packed.addresses,
            channels,
            weight.shape[-1],
            residual,
            source.data_ptr(),
            out.data_ptr(),
            images,
            height,
            width,
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
    shape = (images, channels_out, height // patch_h, width // patch_w)
    out = _empty(shape)
    if out.numel() > 0:
        packed = kept(Packed.product, weight, bias, scale, shift, activation)
        source = to_float32(x)
        _C.product_block(
            packed.addresses,
            channels_out,
            source.data_ptr(),
            out.data_ptr(),
            images,
            channels,
            height,
            width,
            patch_h,
            patch_w,
            torch.get_num_threads(),
        )
    return out.to(x.dtype)


pointwise_block_cpu = patch_embed_cpu
"""A pointwise convolution is one of patches of 1 x 1; see :func:`ops.pointwise_block`."""


class CpuTrunk:
    """Stem, layers and head of a folded ConvMixer, packed once, run by one call.

    Args:
        stem: the patch embedding.
        layers: the layers.
        head: the linear layer on the mean over the positions; without it there are no logits.
        bfloat16: whether products of bfloat16 weights take bfloat16; None where that is faster
            than float32.

    Tensors may be of any dtype, and are copied. Widths must fit together: nothing is checked here.
    """

    def __init__(
        self,
        stem: FoldedBlock,
        layers: Sequence[FoldedLayer],
        head: Head | None = None,
        *,
        bfloat16: bool | None = None,
    ) -> None:
        if bfloat16 is None:
            bfloat16 = stem.weight.dtype == torch.bfloat16 and bfloat16_pays()
        self._channels, in_channels, patch_h, patch_w = stem.weight.shape
        self._patch = patch_h, patch_w
        self._widths = [self._channels, *(layer.pointwise.weight.shape[0] for layer in layers)]
        packed = Packed.product(stem, bfloat16=bfloat16)
        self._packed = [packed]
        self._trunk = _C.Trunk(
            *(packed.addresses, in_channels, patch_h, patch_w, self._channels, packed.numbers)
        )
        done: dict[int, tuple[Packed, Packed]] = {}
        for layer in layers:
            if id(layer) not in done:  # a layer may stand at several positions
                done[id(layer)] = (
                    Packed.depthwise(layer.depthwise),
                    Packed.product(layer.pointwise, bfloat16=bfloat16),
                )
            depthwise, pointwise = done[id(layer)]
            self._packed += [depthwise, pointwise]
            self._channels = layer.pointwise.weight.shape[0]
            self._trunk.add_layer(
                depthwise.addresses,
                layer.depthwise.weight.shape[-1],
                pointwise.addresses,
                self._channels,
                pointwise.numbers,
            )
        self._classes = 0
        if head is not None and head.weight is not None:
            linear = FoldedBlock(head.weight[:, :, None, None], head.bias, None, None, "none")
            packed = Packed.product(linear)
            self._packed.append(packed)
            self._classes = head.weight.shape[0]
            self._trunk.set_head(packed.addresses, self._classes)

    def __call__(self, x: Tensor, result: str) -> Tensor:
        """Map images (N, C, H, W) to ``result``.

        Returns:
            In the dtype of ``x``: ``"features"``: the last layer's output (N, channels, H / P_h,
            W / P_w); ``"mean"``: its mean over the positions (N, channels); ``"logits"``: what the
            head makes of that (N, classes).
        """
        images, _, height, width = x.shape
        shape: tuple[int, ...] = (images, self._channels)
        if result == "features":
            shape += height // self._patch[0], width // self._patch[1]
        elif result == "logits":
            shape = (images, self._classes)
        out = _empty(shape)
        if images > 0:
            source = to_float32(x)
            self._trunk.run(
                source.data_ptr(),
                out.data_ptr(),
                images,
                height,
                width,
                _RESULTS[result],
                torch.get_num_threads(),
            )
        return out.to(x.dtype)

    def intermediates(self, x: Tensor, steps: Sequence[int]) -> list[Tensor]:
        """Map images (N, C, H, W) to the outputs of chosen steps, in one call.

        Args:
            x: the images.
            steps: 0 for the stem, n for layer n counted from 1; rising. Later ones are not run.

        Returns:
            Each (N, channels, H / P_h, W / P_w), in the dtype of ``x``.
        """
        images, _, height, width = x.shape
        plane = height // self._patch[0], width // self._patch[1]
        outs = [_empty((images, self._widths[step], *plane)) for step in steps]
        if images > 0:
            source = to_float32(x)
            addresses = [0] * (steps[-1] + 1)
            for step, out in zip(steps, outs, strict=True):
                addresses[step] = out.data_ptr()
            threads = torch.get_num_threads()
            self._trunk.run_intermediates(
                source.data_ptr(), addresses, images, height, width, threads
            )
        return [out.to(x.dtype) for out in outs]


def _empty(shape: tuple[int, ...]) -> Tensor:
    # Whatever the default device is: the kernels are given its address.
    return torch.empty(shape, dtype=torch.float32, device="cpu")
