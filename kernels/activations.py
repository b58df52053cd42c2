"""What every fused op does after its sum: bias, activation, scale, shift, in float32.

Device functions shared by the kernels of this package. ``ACTIVATION`` is one of the
names of :data:`convmixer_fast.activations.ACTIVATIONS`; the choice is made when the
kernel is compiled and costs nothing when it runs.

``PTX`` says that the kernel is compiled for an NVIDIA device, so that one instruction may
be named where Triton's own functions take several; without it the same is computed with
those, on AMD's devices and in the interpreter.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

__all__ = ["activate", "apply_epilogue"]


@triton.jit
def _gate(exponent, PTX: tl.constexpr):
    """``1 / (1 + 2^exponent)``, to about 2^-22 of the result: 0 and 1 at the infinities."""
    if PTX:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .f32 power;
                ex2.approx.ftz.f32 power, $1;
                add.ftz.f32 power, power, 0f3F800000;
                rcp.approx.ftz.f32 $0, power;
            }
            """,
            "=r,r",
            [exponent],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp2(exponent))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, PTX: tl.constexpr):
    """``act(x)`` for float32 ``x``, with PyTorch's answers for NaN and infinities.

    - ``"gelu"``: ``x / 2 * (1 + erf(x / sqrt(2)))`` (arXiv 1606.08415), with Triton's ``erf``
      if EXACT, whose 35 instructions are for float32's last digits. Otherwise, for results that
      are stored in 16 bits, as ``x * sigmoid(u)``: ``u = log(Phi(x) / Phi(-x))`` is odd, and
      ``-u log2(e) / x`` is a polynomial in ``|x|``. Its coefficients are those of the least
      largest error in units of float16's last place, over 0 to 6: for every finite float16 the
      error is at most 0.27 of them before the result is rounded and 0.76 after it, where
      rounding alone costs 0.5. Beyond 6 the polynomial falls for ever, as its sign must.
    - ``"gelu_tanh"``: ``x / 2 * (1 + tanh(v))``, ``v = sqrt(2 / pi) * (x + 0.044715 x^3)``,
      written as ``x / (1 + exp(-2 v))``, which is the same function. Where ``exp``
      overflows the quotient is the limit, 0; NaN passes through every operation; and
      the left tail does not cancel, as ``1 + tanh`` does.
    - ``"silu"``: ``x / (1 + exp(-x))`` (arXiv 1702.03118).
    - ``"relu"``: ``max(x, 0)``; the propagation of NaN must be asked for.
    - ``"relu6"``: ``min(max(x, 0), 6)``.
    - ``"hardswish"``: ``x * relu6(x + 3) / 6`` (arXiv 1905.02244).
    - ``"leaky_relu"``: ``max(x, x / 100)``.
    """
    if ACTIVATION == "gelu":
        if EXACT:
            return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        else:
            t = tl.abs(x)
            p = -3.34827418e-4 * t + 4.11688238e-3
            p = p * t - 8.86202993e-3
            p = p * t - 9.88556798e-2
            p = p * t + 1.28565353e-3
            p = p * t - 2.3039172
            return x * _gate(x * p, PTX)
    elif ACTIVATION == "gelu_tanh":
        if EXACT:
            # 1.5957691216057308 = 2 * sqrt(2 / pi)
            return x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
        else:
            # 2.3022081... = 2 * sqrt(2 / pi) * log2(e), and 0.044715 times that
            return x * _gate(x * (-0.10294324 * (x * x) - 2.302208198), PTX)
    elif ACTIVATION == "silu":
        if EXACT:
            return x / (1.0 + tl.exp(-x))
        else:
            # log2(e)
            return x * _gate(x * -1.4426950408889634, PTX)
    elif ACTIVATION == "hardswish":
        return x * (_relu6(x + 3.0) * (1.0 / 6.0))
    elif ACTIVATION == "relu6":
        return _relu6(x)
    elif ACTIVATION == "leaky_relu":
        return tl.maximum(x, 0.01 * x, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown ACTIVATION")
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _relu6(x):
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(positive, 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def apply_epilogue(
    acc,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    c_offs,
    c_mask,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    PTX: tl.constexpr,
):
    """``act(acc + bias) * scale + shift``, all in float32.

    Args:
        acc: the sums, float32, any shape.
        bias_ptr: (C,), or None for 0.
        scale_ptr: (C,), or None for 1.
        shift_ptr: (C,), or None for 0.
        c_offs: the channel of each element of acc, broadcastable to its shape.
        c_mask: which of these channels exist.
        ACTIVATION: see :func:`activate`.
        EXACT: in the same way.
        PTX: in the same way.
    """
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c_offs, mask=c_mask, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION, EXACT, PTX)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + c_offs, mask=c_mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + c_offs, mask=c_mask, other=0.0).to(tl.float32)
    return acc
