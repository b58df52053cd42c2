"""TensorRT's Python bindings, and what all that use them need: types, a logger, errors.

Nothing of TensorRT is imported before :func:`load_tensorrt` is called. What the bindings declare
(11.4 and 10.13) is what the rest relies on: the same names exist, spelled alike, in both.
"""

import importlib
import logging
import re
from typing import Any

import torch

from convmixer_fast.errors import MissingDependencyError, TensorRTError

__all__ = ["DATA_TYPES", "Log", "data_type", "load_plugin_package", "load_tensorrt", "torch_dtype"]

MINIMUM = (10, 13)
"""The oldest TensorRT with strongly typed networks and every name used here."""

_INSTALL = "pip install 'tensorrt>=10.13'"

DATA_TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.bool: "BOOL",
}
"""TensorRT's name of a dtype, for the dtypes that PyTorch has too."""

_logger = logging.getLogger("convmixer_fast")


def load_tensorrt() -> Any:
    """Import TensorRT.

    Raises:
        MissingDependencyError: it is not installed, does not load, or is older than 10.13.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"TensorRT cannot be imported ({error}): {_INSTALL}"
        ) from error
    version = str(trt.__version__)
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < MINIMUM:
        raise MissingDependencyError(
            f"TensorRT 10.13 or newer is needed, found {version}: {_INSTALL}"
        )
    return trt


def load_plugin_package() -> Any:
    """Import ``tensorrt.plugin``, which pip's package ``tensorrt`` has only from 10.14 on."""
    try:
        return importlib.import_module("tensorrt.plugin")
    except ModuleNotFoundError:
        return importlib.import_module("tensorrt_bindings.plugin")


def data_type(trt: Any, dtype: torch.dtype) -> Any:
    """Return TensorRT's ``DataType`` for a dtype of :data:`DATA_TYPES`."""
    return getattr(trt.DataType, DATA_TYPES[dtype])


def torch_dtype(trt: Any, kind: Any) -> torch.dtype:
    """Return PyTorch's dtype for TensorRT's.

    Raises:
        TensorRTError: PyTorch has none.
    """
    for dtype, name in DATA_TYPES.items():
        if kind == getattr(trt.DataType, name):
            return dtype
    raise TensorRTError(f"no PyTorch dtype corresponds to TensorRT's {kind}")


class Log:
    """What TensorRT says: handed on to the logger ``convmixer_fast``, and errors kept.

    TensorRT returns None or False where it fails, and tells its logger why.

    Args:
        trt: the bindings.
    """

    def __init__(self, trt: Any) -> None:
        errors: list[str] = []
        severity = trt.ILogger.Severity
        failures = (severity.INTERNAL_ERROR, severity.ERROR)
        levels = {severity.WARNING: logging.WARNING, severity.INFO: logging.DEBUG}

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                """Take one message, from whichever thread it comes."""
                if severity in failures:
                    errors.append(msg)
                    _logger.error("TensorRT: %s", msg)
                elif severity in levels:
                    _logger.log(levels[severity], "TensorRT: %s", msg)

        self.errors = errors
        self.logger = Logger()
        """What TensorRT takes; it must outlive whatever it was given to."""

    def error(self, what: str) -> TensorRTError:
        """Return the exception for a failure, with the errors since the last one."""
        said = "; ".join(self.errors) or "its logger gave no reason"
        self.errors.clear()
        return TensorRTError(f"{what}: {said}")
