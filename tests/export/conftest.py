"""What the exports share."""

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_operators() -> Iterator[None]:
    """PyTorch reads the sources of 500 operators at each export: once is enough here."""
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    patch = pytest.MonkeyPatch()
    registry = registration.ONNXRegistry
    once = functools.cache(registry.from_torchlib)
    patch.setattr(registry, "from_torchlib", staticmethod(once))
    yield
    patch.undo()
