"""The activations that the fused ops know: one row each, for everything that runs or writes them.

A new one is a row here, its name in ``choices.py``, its formula in ``kernels/activations.py`` and
``csrc/cpu/activations.h`` (whose number stands in ``csrc/cpu/kernels.h``), and nothing else:
``tests/test_activations.py`` names what is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation"]


@dataclass(frozen=True)
class Activation:
    """How one activation is computed, recognised and written."""

    function: Callable[[Tensor], Tensor]
    """The definition, element by element, in any floating-point dtype."""
    layer: Callable[[], nn.Module]
    """Makes the module that people build models with."""
    aten: str
    """The ATen operation that ``torch.export`` makes of it, without overload."""
    aten_arguments: Mapping[str, Any] = field(default_factory=dict)
    """What that operation's arguments must be."""
    cpu: int = field(kw_only=True)
    """Its number in ``csrc/cpu/kernels.h``."""
    tensorrt: str = field(kw_only=True)
    """Its name in ``tensorrt.ActivationType``."""
    tensorrt_parameters: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    """``alpha`` and ``beta`` of TensorRT's layer."""
    tensorrt_gate: bool = field(default=False, kw_only=True)
    """Whether TensorRT's layer is a gate: the activation is x times what it computes."""
    homogeneous: bool = field(default=False, kw_only=True)
    """Whether ``act(s x) = s act(x)`` for every s > 0, so that a scale can go into the weights."""
    parts: Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)
    """The definition in simpler operations, for runtimes without an operator of that name."""


ACTIVATIONS = {
    "gelu": Activation(
        F.gelu,
        nn.GELU,
        "gelu",
        {"approximate": "none"},
        cpu=1,
        tensorrt="GELU_ERF",
        parts=lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)),
    ),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda: nn.GELU(approximate="tanh"),
        "gelu",
        {"approximate": "tanh"},
        cpu=2,
        tensorrt="GELU_TANH",
    ),
    "relu": Activation(F.relu, nn.ReLU, "relu", cpu=3, tensorrt="RELU", homogeneous=True),
    "silu": Activation(F.silu, nn.SiLU, "silu", cpu=4, tensorrt="SIGMOID", tensorrt_gate=True),
    "relu6": Activation(
        F.relu6,
        nn.ReLU6,
        "hardtanh",
        {"min_val": 0, "max_val": 6},
        cpu=5,
        tensorrt="CLIP",
        tensorrt_parameters={"alpha": 0.0, "beta": 6.0},
    ),
    "hardswish": Activation(
        F.hardswish,
        nn.Hardswish,
        "hardswish",
        cpu=6,
        tensorrt="HARD_SIGMOID",
        tensorrt_parameters={"alpha": 1 / 6, "beta": 0.5},
        tensorrt_gate=True,
    ),
    "leaky_relu": Activation(
        F.leaky_relu,
        nn.LeakyReLU,
        "leaky_relu",
        {"negative_slope": 0.01},
        cpu=7,
        tensorrt="LEAKY_RELU",
        tensorrt_parameters={"alpha": 0.01},
        homogeneous=True,
    ),
}
"""By the name that the ops' ``activation`` takes; kernels know them by the same names."""
