"""The words that options take: one type each, for type checkers, messages and the command line."""

from typing import Any, Literal, get_args

import torch

__all__ = [
    "DTYPES",
    "ActivationName",
    "BackendName",
    "CalibrationMethod",
    "CudaGraphs",
    "Device",
    "FloatPrecision",
    "InTraining",
    "OnnxTarget",
    "OpenVinoPrecision",
    "Plugins",
    "Precision",
    "PredictionFormat",
    "ServerDevice",
    "TorchOps",
    "Verify",
    "check_choice",
    "float_precision",
    "listed",
    "words",
]

ActivationName = Literal["gelu", "gelu_tanh", "relu", "silu", "relu6", "hardswish", "leaky_relu"]
"""The rows of :data:`activations.ACTIVATIONS`."""
BackendName = Literal["auto", "triton", "cpu", "reference"]
"""Those of :func:`backend_info`, and the choice among them."""
FloatPrecision = Literal["float32", "float16", "bfloat16"]
Precision = Literal[FloatPrecision, "int8"]
OpenVinoPrecision = Literal["float32", "float16", "int8"]
CalibrationMethod = Literal["minmax", "percentile", "entropy"]
CudaGraphs = Literal["auto"] | bool
InTraining = Literal["raise", "stay"]
OnnxTarget = Literal["onnxruntime", "tensorrt"]
Verify = Literal["auto"] | bool
TorchOps = Literal["plain", "fused"]
Plugins = Literal["none", "triton"]
PredictionFormat = Literal["text", "json", "csv"]
Device = Literal["auto", "cuda", "cpu"]
ServerDevice = Literal["auto", "gpu", "cpu"]

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(FloatPrecision)}
"""PyTorch's dtypes, by their names."""


def words(choice: Any) -> tuple[str, ...]:
    """Return the words of a :data:`typing.Literal`."""
    return get_args(choice)


def float_precision(dtype: torch.dtype) -> FloatPrecision:
    """Return the name of one of :data:`DTYPES`."""
    (name,) = (name for name in words(FloatPrecision) if DTYPES[name] == dtype)
    return name  # type: ignore[return-value]


def check_choice(name: str, value: object, choice: Any) -> None:
    """Check that an argument is one of its words.

    Args:
        name: of the argument.
        value: what was given.
        choice: its type, a :data:`typing.Literal`.

    Raises:
        ValueError: it is none of them.
    """
    if value not in words(choice):
        accepted = ", ".join(map(repr, words(choice)))
        raise ValueError(f"{name} must be one of {accepted}, got {value!r}")


def listed(name: str, text: str, choice: Any) -> list[str]:
    """Return the words of a text that separates them by commas.

    Raises:
        ValueError: one is none of the choice's.
    """
    found = [word.strip() for word in text.split(",")]
    for word in found:
        check_choice(name, word, choice)
    return found
