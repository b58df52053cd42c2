"""Patch embedding: ``act(patch_conv(x, weight) + bias) * scale + shift``, in Triton.

Patches do not overlap, so that the convolution is one matrix product per image:
the patches are rearranged once into (C_in * P_h * P_w, H' * W') columns, which hold
every pixel at most once and so are never larger than the image, and the pointwise
block's kernel does the rest.

Source: Trockman and Kolter, "Patches Are All You Need?", arXiv 2201.09792, section 2.
"""

from torch import Tensor

from convmixer_fast.kernels.pointwise_block import pointwise_block_triton

__all__ = ["patch_embed_triton", "patches_as_channels"]


def patch_embed_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    """``act(patch_conv(x) + bias) * scale + shift``; see :func:`ops.patch_embed`.

    Args:
        x: (N, C_in, H, W), any strides, fp16|bf16|fp32. Rows and columns of pixels
            beyond the last whole patch are not read.
        weight: (C_out, C_in, P_h, P_w), dtype of x.
        bias: (C_out,), dtype of x or fp32; None for 0.
        scale: as bias; None for 1.
        shift: as bias; None for 0.
        activation: a name of :data:`convmixer_fast.activations.ACTIVATIONS`.

    Returns:
        (N, C_out, H // P_h, W // P_w), contiguous, dtype of x.

    Equivalent to ``reference.patch_embed_ref(x, ...)``, summed in float32.
    """
    channels_out, channels_in, patch_h, patch_w = weight.shape
    columns = channels_in * patch_h * patch_w
    return pointwise_block_triton(
        patches_as_channels(x, patch_h, patch_w),
        weight.reshape(channels_out, columns, 1, 1),
        bias,
        scale,
        shift,
        activation,
    )


def patches_as_channels(x: Tensor, patch_h: int, patch_w: int) -> Tensor:
    """Rearrange (N, C, H, W) into (N, C * P_h * P_w, H', W'): a view where one will do.

    The order of the new channels is that of the weights, (C, P_h, P_w).
    """
    images, channels, height, width = x.shape
    rows, columns = height // patch_h, width // patch_w
    x = x[:, :, : rows * patch_h, : columns * patch_w]
    x = x.unflatten(3, (columns, patch_w)).unflatten(2, (rows, patch_h))
    return x.permute(0, 1, 3, 5, 2, 4).reshape(images, channels * patch_h * patch_w, rows, columns)
