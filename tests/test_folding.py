"""Folding is exact algebra, in float64, and one plain-data form."""

import pytest
import torch

from convmixer_fast import FusedConvMixer, fold, recognize
from convmixer_fast.randomize import randomize
from convmixer_fast.spec import FoldedConvMixer, Head
from convmixer_fast.verify import relative_error
from tests.zoo import VARIATIONS, locuslab


@pytest.mark.parametrize(
    "name", ["locuslab", "no-bias", "no-affine", "batchnorm-eps", "even-kernel-same", "weight-norm"]
)
def test_exact_in_float64(name):
    variation = VARIATIONS[name]
    model = variation.model().double()
    folded = fold(recognize(model))
    x = variation.image().double()
    with torch.no_grad():
        assert relative_error(FusedConvMixer(folded, "reference")(x), model(x)) < 1e-14


def test_form():
    folded = fold(recognize(randomize(locuslab(8, 2, 4, 2))), torch.float16)
    assert isinstance(folded, FoldedConvMixer)
    depthwise, pointwise = folded.layers[1].depthwise, folded.layers[1].pointwise
    assert depthwise.weight.shape == (8, 1, 5, 5)  # an even kernel becomes odd
    assert depthwise.shift is None  # it moved into the pointwise bias
    for block in (folded.stem, depthwise, pointwise):
        assert block.weight.dtype == torch.float16
        assert block.scale.dtype == block.bias.dtype == torch.float32
    assert isinstance(folded.head, Head)
    assert folded.head.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_shares_no_memory_with_the_source(dtype):
    model = randomize(locuslab(8, 2, 3, 2)).to(dtype)
    owned = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    fused = FusedConvMixer(fold(recognize(model)))
    assert not owned & {p.data_ptr() for p in fused.parameters()}


def test_folds_in_float64():
    """A shift that float32 would lose in W t1 + b2 survives until the final rounding."""
    model = randomize(locuslab(64, 1, 3, 2))
    layer = model[3]
    with torch.no_grad():
        layer[0].fn[2].bias.mul_(1e4)
    bias = fold(recognize(model)).layers[0].pointwise.bias
    norm = layer[0].fn[2]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    exact = layer[1].weight[:, :, 0, 0].double() @ shift + layer[1].bias.double()
    assert torch.equal(bias, exact.float())


def test_layers_shared_in_the_source_are_folded_once():
    folded = fold(recognize(VARIATIONS["shared-layers"].model()))
    assert len(folded.layers) == 3
    assert folded.layers[0] is folded.layers[1] is folded.layers[2]


def test_layers_that_only_look_shared_are_not():
    model = randomize(locuslab(8, 2, 3, 2))
    model[4].load_state_dict(model[3].state_dict())
    model[4][3].eps = 0.5
    for ours, theirs in (("weight", "weight"), ("bias", "bias")):
        setattr(model[4][1], ours, getattr(model[3][1], theirs))
    folded = fold(recognize(model))
    assert folded.layers[0] is not folded.layers[1]
    assert not torch.equal(folded.layers[0].pointwise.scale, folded.layers[1].pointwise.scale)


def test_dtype_must_be_floating():
    spec = recognize(randomize(locuslab(8, 1, 3, 2)))
    with pytest.raises(TypeError, match=r"must be a floating-point type, got torch\.int32"):
        fold(spec, torch.int32)
