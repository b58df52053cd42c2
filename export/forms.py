"""In which form a block is written for a runtime: a table, with what was measured.

Every form computes ``act(conv(x) + bias) * scale + shift``. Runtimes fuse some better than others.
"""

from typing import NamedTuple

from convmixer_fast.choices import OnnxTarget, check_choice

__all__ = ["FORMS", "TARGETS", "Form", "choose_form"]


class Form(NamedTuple):
    """How scale and shift of a block are written."""

    norm: str
    """``"batch_norm"``: BatchNormalization with mean 0 and variance 1. ``"affine"``: Mul and Add.
    ``"depthwise"``: a 1 x 1 depthwise Conv."""
    fold_scales: bool = False
    """Whether positive scales go into the convolution where the activation lets them, as ReLU does:
    ``s relu(v) = relu(s v)``."""
    scales_forward: bool = False
    """Whether scales go into the weights of the next layer, so that an Add is left of the norm."""
    in_parts: bool = False
    """Whether activations are written in simpler operations, GELU with Erf as before opset 20."""


FORMS = {
    "batch_norm": Form("batch_norm"),
    "batch_norm_relu": Form("batch_norm", fold_scales=True),
    "depthwise": Form("depthwise"),
    "affine": Form("affine"),
    "affine_relu": Form("affine", fold_scales=True),
    "shift": Form("batch_norm", scales_forward=True),
    "gelu_parts": Form("batch_norm", in_parts=True),
}
"""By name, as ``to_onnx(form=...)`` takes them."""

TARGETS = {
    # ONNX Runtime on a CPU turns BatchNormalization into a 1 x 1 depthwise Conv, to which it adds
    # the residual, and keeps its blocked layout from the first Conv to the last; so does the
    # 1 x 1 Conv itself. Mul and Add with a constant leave that layout: 32 more reorderings in a
    # model of 8 layers. benchmarks/README.md has the times of all forms.
    "onnxruntime": "batch_norm",
    # Not measured. TensorRT reads BatchNormalization as one scale layer, Mul and Add as two.
    "tensorrt": "batch_norm",
}
"""The form for a runtime, by the name of :data:`FORMS`."""


def choose_form(target: str, form: str | None) -> tuple[str, Form]:
    """Return the name and the form for a target, or the one that is named.

    Raises:
        ValueError: there is no target, or no form, of that name.
    """
    check_choice("target", target, OnnxTarget)
    name = TARGETS[target] if form is None else form
    if name not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
    return name, FORMS[name]
