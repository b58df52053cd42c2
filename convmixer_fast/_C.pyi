"""Compiled CPU kernels, on addresses of contiguous float32 tensors; see csrc/bindings.cpp.

``bias``, ``scale`` and ``shift`` may be 0 for none; ``activation`` is 0 (gelu), 1 (gelu_tanh)
or 2 (relu).
"""

def isa() -> str: ...
def depthwise_block(
    x: int,
    weight: int,
    bias: int,
    scale: int,
    shift: int,
    out: int,
    images: int,
    channels: int,
    height: int,
    width: int,
    kernel_size: int,
    activation: int,
    residual: bool,
    threads: int,
) -> None: ...
def pointwise_block(
    x: int,
    weight: int,
    bias: int,
    scale: int,
    shift: int,
    out: int,
    images: int,
    channels: int,
    height: int,
    width: int,
    channels_out: int,
    activation: int,
    threads: int,
) -> None: ...
def patch_embed(
    x: int,
    weight: int,
    bias: int,
    scale: int,
    shift: int,
    out: int,
    images: int,
    channels: int,
    height: int,
    width: int,
    channels_out: int,
    patch_h: int,
    patch_w: int,
    activation: int,
    threads: int,
) -> None: ...
