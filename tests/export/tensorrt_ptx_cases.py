"""The plugins whose PTX is assembled."""

from typing import NamedTuple


class Case(NamedTuple):
    """A depthwise block."""

    dtype: str
    shape: tuple[int, int, int, int]
    kernel_size: int
    activation: str = "gelu"
    bias: bool = True
    capabilities: tuple[int, ...] = (80, 90, 100)


CASES = {
    # The published models, and the tiles of large and of small batches.
    "768-fp16": Case("float16", (64, 768, 32, 32), 7, "relu"),
    "1536-bf16": Case("bfloat16", (1, 1536, 32, 32), 9, capabilities=(90,)),
    # Nothing is aligned, and the wider window.
    "odd-fp16": Case("float16", (3, 40, 13, 11), 5, bias=False),
    "k11-fp16": Case("float16", (3, 64, 32, 32), 11, capabilities=(80,)),
    # Direct taps: float32, planes that are too narrow, kernels that are too large.
    "768-fp32": Case("float32", (8, 768, 32, 32), 7, "gelu_tanh"),
    "narrow-fp16": Case("float16", (3, 40, 5, 3), 3, bias=False, capabilities=(100,)),
    "k17-bf16": Case("bfloat16", (3, 40, 24, 24), 17, "relu", capabilities=(90,)),
}

RUNS = {
    f"{name}-{capability}": (case, capability)
    for name, case in CASES.items()
    for capability in case.capabilities
}
"""By name, for each device."""
