"""``torch.compile(model, backend="convmixer_fast")``, by its name alone."""

import pytest
import torch
from torch import nn

from convmixer_fast import UnsupportedModelError
from convmixer_fast.accuracy import relative_error
from convmixer_fast.runtime.fused import FusedConvMixer
from tests.sweeps import sparse
from tests.zoo import VARIATIONS


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    """Shapes that the optimized module was called with."""
    seen = []
    right = FusedConvMixer.forward

    def forward(module, x):
        seen.append(tuple(x.shape))
        return right(module, x)

    monkeypatch.setattr(FusedConvMixer, "forward", forward)
    return seen


def check(compiled, model, x):
    with torch.inference_mode():
        assert relative_error(compiled(x), model(x)) < 1e-5


def test_it_is_found_by_name():
    assert "convmixer_fast" in torch._dynamo.list_backends(exclude_tags=None)


@pytest.mark.parametrize(
    "name", sparse(["reference", "locuslab", "labml", "two-heads"], lambda name: name == "locuslab")
)
def test_models_of_any_size(name, calls):
    variation = VARIATIONS[name]
    model = variation.model()
    compiled = torch.compile(model, backend="convmixer_fast")
    for shape in (variation.shape, (5, 3, 22, 41), (1, 3, 30, 37)):
        check(compiled, model, torch.randn(shape))
        assert shape in calls


@pytest.mark.exhaustive
def test_options(monkeypatch):
    model = VARIATIONS["reference"].model()
    used = []
    right = FusedConvMixer.__init__

    def init(self, folded, backend="auto", **options):
        used.append(backend)
        right(self, folded, backend, **options)

    monkeypatch.setattr(FusedConvMixer, "__init__", init)
    compiled = torch.compile(
        model, backend="convmixer_fast", options={"backend": "reference", "verify": True}
    )
    check(compiled, model, VARIATIONS["reference"].image())
    assert set(used) == {"reference"}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = VARIATIONS["reference"].model()

    def forward(self, x, y):
        return self.model(x) + self.model(y)


def test_others_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU()).eval()
    compiled = torch.compile(model, backend="convmixer_fast")
    with torch.inference_mode(), pytest.raises(UnsupportedModelError, match="patch convolution"):
        compiled(torch.zeros(2, 3, 8, 8))
    compiled = torch.compile(Two().eval(), backend="convmixer_fast")
    images = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    with (
        torch.inference_mode(),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="found 2 tensors beside"),
    ):
        compiled(*images)
