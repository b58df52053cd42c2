"""The fused ops of a ConvMixer, public and checked.

Each op is a ``torch.library`` custom op in the namespace ``convmixer_fast``, so
that ``torch.compile`` and ``torch.export`` keep it whole, and runs on one of the
backends of :mod:`convmixer_fast.runtime.backends`. Arguments are checked here, once;
launchers and kernels trust them.

Shapes: N images, C channels, H x W positions, K the depthwise kernel's side,
P the patch's side. All tensors of a call share one device. ``x`` and ``weight``
share one dtype (float16, bfloat16, float32; float64 on the reference backend);
``bias``, ``scale`` and ``shift`` have that dtype or float32. Results are
contiguous (N, C, H, W) whatever the memory format of ``x``. Under autocast,
``x`` and ``weight`` are cast to the autocast dtype, as by ``F.conv2d``.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.choices import ActivationName, BackendName
from convmixer_fast.errors import InferenceOnlyError
from convmixer_fast.runtime import backends
from convmixer_fast.spec import DTYPES

__all__ = [
    "DTYPES",
    "asks_for_gradient",
    "check_dense",
    "depthwise_block",
    "patch_embed",
    "pointwise_block",
]


def depthwise_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    activation: ActivationName = "gelu",
    residual: bool = True,
    backend: BackendName = "auto",
) -> Tensor:
    """``act(depthwise_conv(x, weight) + bias) * scale + shift + x``, zero-padded to the same size.

    ConvMixer's token mixing with its BatchNorm in eval form (arXiv 2201.09792, section 2).

    Args:
        x: (N, C, H, W).
        weight: (C, 1, K, K), K odd.
        bias: (C,), added before the activation; None for 0.
        scale: (C,), None for 1.
        shift: (C,), None for 0.
        activation: a row of :data:`activations.ACTIVATIONS`.
        residual: whether ``x`` is added.
        backend: ``"auto"``, or the name of one of :data:`backends.BACKENDS`.

    Returns:
        (N, C, H, W), contiguous, in the dtype of ``x``.

    Equivalent to::

        y = act(F.conv2d(x, weight, bias, padding=K // 2, groups=C))
        y * scale[:, None, None] + shift[:, None, None] + x

    In 16 bits on the ``triton`` backend a NaN or an infinity in ``x`` makes NaN of the results
    around it, its own place included: up to 23 columns and K // 2 + 1 rows away.

    Raises:
        ValueError: a shape, device, activation or backend name is wrong.
        TypeError: a dtype is wrong.
        BackendUnavailableError: the backend named cannot run here.
        InferenceOnlyError: a gradient is asked for.
    """
    name = "depthwise_block"
    x, weight = _autocast(x, weight)
    _check_tensors(name, x, weight)
    channels, kernel_size = x.shape[1], weight.shape[-1]
    if weight.shape != (channels, 1, kernel_size, kernel_size):
        raise ValueError(
            f"{name}: weight must be (C, 1, K, K) with C={channels}, got {tuple(weight.shape)}"
        )
    if kernel_size % 2 == 0:
        raise ValueError(
            f"{name}: the kernel size must be odd, got {kernel_size}; "
            "pad an even kernel with zeros to the next odd size"
        )
    _check_epilogue(name, x, channels, activation, bias=bias, scale=scale, shift=shift)
    out: Tensor = _depthwise_block(x, weight, bias, scale, shift, activation, residual, backend)
    return out


def pointwise_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    activation: ActivationName = "gelu",
    backend: BackendName = "auto",
) -> Tensor:
    """``act(pointwise_conv(x, weight) + bias) * scale + shift``.

    ConvMixer's channel mixing with its BatchNorm in eval form (arXiv 2201.09792, section 2).

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, 1, 1).
        bias: (C_out,), added before the activation; None for 0.
        scale: (C_out,), None for 1.
        shift: (C_out,), None for 0.
        activation: a row of :data:`activations.ACTIVATIONS`.
        backend: ``"auto"``, or the name of one of :data:`backends.BACKENDS`.

    Returns:
        (N, C_out, H, W), contiguous, in the dtype of ``x``.

    Equivalent to::

        act(F.conv2d(x, weight, bias)) * scale[:, None, None] + shift[:, None, None]

    Raises:
        ValueError: a shape, device, activation or backend name is wrong.
        TypeError: a dtype is wrong.
        BackendUnavailableError: the backend named cannot run here.
        InferenceOnlyError: a gradient is asked for.
    """
    name = "pointwise_block"
    x, weight = _autocast(x, weight)
    _check_tensors(name, x, weight)
    channels_out, channels_in = weight.shape[0], x.shape[1]
    if weight.shape[1:] != (channels_in, 1, 1):
        raise ValueError(
            f"{name}: weight must be (C_out, C_in, 1, 1) with C_in={channels_in}, "
            f"got {tuple(weight.shape)}"
        )
    _check_epilogue(name, x, channels_out, activation, bias=bias, scale=scale, shift=shift)
    out: Tensor = _pointwise_block(x, weight, bias, scale, shift, activation, backend)
    return out


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    activation: ActivationName = "gelu",
    backend: BackendName = "auto",
) -> Tensor:
    """``act(patch_conv(x, weight) + bias) * scale + shift``, the stride being the patch's size.

    ConvMixer's patch embedding with its BatchNorm in eval form (arXiv 2201.09792, section 2).
    Rows and columns of pixels beyond the last whole patch are not read.

    Args:
        x: (N, C_in, H, W), at least one patch high and wide.
        weight: (C_out, C_in, P_h, P_w).
        bias: (C_out,), added before the activation; None for 0.
        scale: (C_out,), None for 1.
        shift: (C_out,), None for 0.
        activation: a row of :data:`activations.ACTIVATIONS`.
        backend: ``"auto"``, or the name of one of :data:`backends.BACKENDS`.

    Returns:
        (N, C_out, H // P_h, W // P_w), contiguous, in the dtype of ``x``.

    Equivalent to::

        y = act(F.conv2d(x, weight, bias, stride=(P_h, P_w)))
        y * scale[:, None, None] + shift[:, None, None]

    Raises:
        ValueError: a shape, device, activation or backend name is wrong.
        TypeError: a dtype is wrong.
        BackendUnavailableError: the backend named cannot run here.
        InferenceOnlyError: a gradient is asked for.
    """
    name = "patch_embed"
    x, weight = _autocast(x, weight)
    _check_tensors(name, x, weight)
    channels_out, channels_in, patch_h, patch_w = weight.shape
    if x.shape[1] != channels_in:
        raise ValueError(
            f"{name}: x must have {channels_in} channels, as weight {tuple(weight.shape)} has, "
            f"got {tuple(x.shape)}"
        )
    if x.shape[2] < patch_h or x.shape[3] < patch_w:
        raise ValueError(
            f"{name}: the image is smaller than one patch: it is {x.shape[2]} x {x.shape[3]}, "
            f"and a patch {patch_h} x {patch_w}"
        )
    _check_epilogue(name, x, channels_out, activation, bias=bias, scale=scale, shift=shift)
    out: Tensor = _patch_embed(x, weight, bias, scale, shift, activation, backend)
    return out


def _launcher(op: str, x: Tensor, backend: str) -> Callable[..., Tensor]:
    # A custom op's words are any text, for PyTorch; resolve() refuses others.
    chosen = backends.resolve(cast(BackendName, backend), x.device, x.dtype)
    return backends.launcher(op, chosen)


@torch.library.custom_op("convmixer_fast::depthwise_block", mutates_args=())
def _depthwise_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    residual: bool,
    backend: str,
) -> Tensor:
    run = _launcher("depthwise_block", x, backend)
    return run(x, weight, bias, scale, shift, activation, residual)


@_depthwise_block.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    residual: bool,
    backend: str,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("convmixer_fast::pointwise_block", mutates_args=())
def _pointwise_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    run = _launcher("pointwise_block", x, backend)
    return run(x, weight, bias, scale, shift, activation)


@torch.library.custom_op("convmixer_fast::patch_embed", mutates_args=())
def _patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    run = _launcher("patch_embed", x, backend)
    return run(x, weight, bias, scale, shift, activation)


@_pointwise_block.register_fake
@_patch_embed.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    channels_out, _, patch_h, patch_w = weight.shape
    return x.new_empty((x.shape[0], channels_out, x.shape[2] // patch_h, x.shape[3] // patch_w))


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    floating = x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)
    if enabled and floating:
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), weight.to(dtype)
    return x, weight


def _check_tensors(op: str, x: Tensor, weight: Tensor) -> None:
    check_dense(f"{op}: x", x)
    check_dense(f"{op}: weight", weight)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (N, C, H, W), got {x.dim()} dimensions {tuple(x.shape)}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight must have 4 dimensions, none of them 0, got shape {tuple(weight.shape)}"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: x must be a floating-point tensor (float16, bfloat16, float32 or float64), "
            f"got {x.dtype}; convert it first"
        )
    if weight.dtype != x.dtype:
        raise TypeError(
            f"{op}: x and weight must have one dtype, got {x.dtype} and {weight.dtype}; "
            "cast one of them, or use autocast"
        )
    if weight.device != x.device:
        raise ValueError(
            f"{op}: x and weight must be on one device, got {x.device} and {weight.device}"
        )
    _check_gradient(op, x, weight)


def check_dense(what: str, x: Tensor) -> None:
    """Check that ``x`` is an ordinary tensor, whose numbers stand in memory at strides.

    Raises:
        TypeError: it is sparse, nested, of oneDNN's own layout ...
    """
    if x.layout != torch.strided or (x.is_nested and not torch.compiler.is_compiling()):
        kind = "nested" if x.is_nested else f"{x.layout}".removeprefix("torch.").removeprefix("_")
        raise TypeError(
            f"{what} must be a dense tensor (N, C, H, W), got a {kind} one; x.to_dense() makes one "
            "of a sparse tensor or one of oneDNN's, torch.nested.to_padded_tensor of a nested one"
        )


def asks_for_gradient(*tensors: Tensor) -> bool:
    """Whether a gradient is asked for, backward or forward."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    # No level is entered but by forward-mode differentiation.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _check_gradient(op: str, *tensors: Tensor) -> None:
    if asks_for_gradient(*tensors):
        raise InferenceOnlyError(
            f"{op} has no backward pass, and an input requires a gradient; call it under "
            "torch.inference_mode() or torch.no_grad(), or detach the input"
        )


def _check_epilogue(
    op: str, x: Tensor, channels: int, activation: str, **vectors: Tensor | None
) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{op}: activation must be one of {known}, got {activation!r}")
    for name, vector in vectors.items():
        if vector is None:
            continue
        _check_gradient(op, vector)
        if vector.shape != (channels,):
            raise ValueError(f"{op}: {name} must be ({channels},), got {tuple(vector.shape)}")
        if vector.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{op}: {name} must be float32 or of the dtype of x ({x.dtype}), got {vector.dtype}"
            )
        if vector.device != x.device:
            raise ValueError(
                f"{op}: x and {name} must be on one device, got {x.device} and {vector.device}"
            )
