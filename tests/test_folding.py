"""Folding is exact algebra, in float64, and one plain-data form."""

import copy

import pytest
import torch

from convmixer_fast import FusedConvMixer, fold, recognize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.randomize import randomize
from convmixer_fast.spec import FoldedConvMixer, Head
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
    assert depthwise.shift is not None  # what is stored between the ops is centred
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
    """A shift in which float32 would cancel is right to the last rounding."""
    model = randomize(locuslab(64, 1, 3, 2))
    norm = model[3][0].fn[2]
    with torch.no_grad():
        norm.running_var.fill_(1e-6)
        norm.running_mean.fill_(1234.567)
        norm.bias.copy_(norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt())
    folded = fold(recognize(model)).layers[0].depthwise
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    torch.testing.assert_close(folded.scale, scale.float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(folded.shift, shift.float(), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("mean", "var"), [(20, 1e-12), (250, 1e-6), (3, 1e-4)])
def test_channels_that_hardly_vary_keep_their_digits(dtype, mean, var):
    model = locuslab(16, 2, 3, 2).eval()
    for layer in (model[3], model[4]):
        conv, _, norm = layer[0].fn
        with torch.no_grad():
            conv.bias.fill_(mean)
            conv.weight.mul_(1e-3)
            norm.running_mean.fill_(mean)
            norm.running_var.fill_(var)
    x = torch.randn(2, 3, 16, 16).to(dtype)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        fused = FusedConvMixer(fold(recognize(model), dtype), "reference")
        error = relative_error(fused(x), truth)
        eager = relative_error(copy.deepcopy(model).to(dtype)(x), truth)
    assert error <= 1.2 * eager + 8 * torch.finfo(dtype).eps


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
    with pytest.raises(TypeError, match=r"must be one of .*, got torch\.int32"):
        fold(spec, torch.int32)
