"""What the checks of the TensorRT export share: an export to a double, small models, errors.

Import it after ``tensorrt_bindings.load``, as everything that imports ``tensorrt``.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from convmixer_fast import ConvMixer, recognize
from convmixer_fast.export import trt_bindings, trt_engine, trt_plugin
from convmixer_fast.export.trt_engine import to_tensorrt
from convmixer_fast.models.randomize import randomize
from tests.export.tensorrt_interpreter import Network

SIZE = (12, 15)


# Models are only read, and tracing one takes longer than all the rest.
trt_engine.recognize = functools.cache(recognize)


@functools.cache
def small(**options: Any) -> nn.Module:
    return randomize(ConvMixer(8, 2, 3, 3, num_classes=5, **options).eval())


@contextmanager
def using(bindings: Any) -> Iterator[Path]:
    """Let the export code find these bindings."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(trt_bindings, "load_tensorrt", return_value=bindings),
        # A GPU that is here decides what may be compiled.
        mock.patch.object(torch.cuda, "is_available", return_value=False),
    ):
        yield Path(folder)


def export(network: Network, model: Any, **options: Any) -> Any:
    """Run the whole export on a double."""
    made = trt_plugin.DepthwisePlugin.of

    def keep(*arguments: Any) -> Any:
        plugin = made(*arguments)
        network.plugins[plugin.name] = plugin
        return plugin

    options = {"image_size": SIZE, "max_batch": 4, "progress": False, **options}
    with using(network) as folder, mock.patch.object(trt_plugin.DepthwisePlugin, "of", keep):
        return to_tensorrt(model, folder / "engine", **options)


def error_of(network: Network, expected: type[Exception], *arguments: Any, **options: Any) -> str:
    return raised(expected, lambda: export(network, *arguments, **options))


def raised(
    expected: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]
) -> str:
    try:
        call()
    except expected as error:
        return str(error)
    raise AssertionError(f"not refused: expected {expected}")
