"""What every fused op does after its sum: bias, activation, scale, shift, in float32.

Device functions shared by the kernels of this package. ``ACTIVATION`` is one of the
names of :data:`convmixer_fast.reference.ACTIVATIONS`; the choice is made when the
kernel is compiled and costs nothing when it runs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

__all__ = ["activate", "apply_epilogue"]


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``act(x)`` for float32 ``x``, with PyTorch's answers for NaN and infinities.

    - ``"gelu"``: ``x / 2 * (1 + erf(x / sqrt(2)))`` (arXiv 1606.08415).
    - ``"gelu_tanh"``: ``x / 2 * (1 + tanh(u))``, ``u = sqrt(2 / pi) * (x + 0.044715 x^3)``,
      written as ``x / (1 + exp(-2 u))``, which is the same function. Where ``exp``
      overflows the quotient is the limit, 0; NaN passes through every operation; and
      the left tail does not cancel, as ``1 + tanh`` does.
    - ``"relu"``: ``max(x, 0)``; the propagation of NaN must be asked for.
    """
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 1.5957691216057308 = 2 * sqrt(2 / pi)
        return x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown ACTIVATION")
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def apply_epilogue(
    acc,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    c_offs,
    c_mask,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """``act(acc + bias) * scale + shift``, all in float32.

    Args:
        acc: the sums, float32, any shape.
        bias_ptr: (C,), read only if HAS_BIAS; in the same way scale_ptr and shift_ptr.
        scale_ptr: (C,).
        shift_ptr: (C,).
        c_offs: the channel of each element of acc, broadcastable to its shape.
        c_mask: which of these channels exist.
        ACTIVATION: see :func:`activate`.
        HAS_BIAS: whether there is a bias.
        HAS_SCALE: whether there is a scale.
        HAS_SHIFT: whether there is a shift.
    """
    if HAS_BIAS:
        acc += tl.load(bias_ptr + c_offs, mask=c_mask, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + c_offs, mask=c_mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        acc += tl.load(shift_ptr + c_offs, mask=c_mask, other=0.0).to(tl.float32)
    return acc
