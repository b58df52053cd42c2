"""Stem, layers and head of a folded ConvMixer, kernel after kernel, without the ops between."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer_fast.kernels.depthwise_block import depthwise_block_triton
from convmixer_fast.kernels.patch_embed import patch_embed_triton
from convmixer_fast.kernels.pointwise_block import aligned_rows, pointwise_block_triton
from convmixer_fast.spec import FoldedBlock, FoldedLayer, Head

__all__ = ["TritonTrunk"]


class TritonTrunk:
    """What the engine of a FusedConvMixer calls on a GPU.

    Besides weights, a call holds two activations at a time: each kernel's input and output, whose
    memory PyTorch's allocator gives to the next ones.

    Args:
        stem: the patch embedding.
        layers: the layers.
        head: the linear layer on the mean over the positions; without it there are no logits.

    Tensors are taken as they are, not copied, but for the stem's weights, whose rows are
    aligned here, once. Widths must fit together: nothing is checked here.
    """

    def __init__(
        self, stem: FoldedBlock, layers: Sequence[FoldedLayer], head: Head | None = None
    ) -> None:
        rows = aligned_rows(stem.weight.detach().flatten(1))
        self._stem_weight = rows.unflatten(1, stem.weight.shape[1:])
        self._stem = stem
        self._layers = tuple(layers)
        self._head = head

    @torch.no_grad()
    def __call__(self, x: Tensor, result: str) -> Tensor:
        """Map images (N, C, H, W) to ``result``, in the dtype of ``x``.

        Returns:
            ``"features"``: the last layer's output (N, channels, H / P_h, W / P_w); ``"mean"``:
            its mean over the positions (N, channels); ``"logits"``: what the head makes of that
            (N, classes).
        """
        stem = self._stem
        x = patch_embed_triton(
            x, self._stem_weight, stem.bias, stem.scale, stem.shift, stem.activation
        )
        for layer in self._layers:
            block = layer.depthwise
            x = depthwise_block_triton(
                x, block.weight, block.bias, block.scale, block.shift, block.activation, True
            )
            block = layer.pointwise
            x = pointwise_block_triton(
                x, block.weight, block.bias, block.scale, block.shift, block.activation
            )
        if result == "features":
            return x
        x = x.mean((2, 3))
        if result == "mean":
            return x
        assert self._head is not None
        assert self._head.weight is not None  # else there are no logits to ask for
        return F.linear(x, self._head.weight, self._head.bias)
