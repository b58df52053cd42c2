"""What is no ConvMixer, each refused with the first place that differs."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convmixer_fast import UnsupportedModelError, optimize, recognize
from convmixer_fast.models.randomize import randomize
from tests.timm_models import timm_model
from tests.zoo import LocusResidual, locuslab


def _layer_with(**changes):
    """Return a locuslab model whose second layer has parts replaced."""
    model = locuslab(8, 3, 3, 2)
    layer = model[4]
    for part, module in changes.items():
        match part:
            case "depthwise":
                layer[0].fn[0] = module
            case "depthwise_act":
                layer[0].fn[1] = module
            case "depthwise_norm":
                layer[0].fn[2] = module
            case "residual":
                layer[0] = module(layer[0].fn)
            case "pointwise":
                layer[1] = module
            case "pointwise_act":
                layer[2] = module
            case "pointwise_norm":
                layer[3] = module
    return randomize(model)


class _Scaled(LocusResidual):
    def forward(self, x):
        return torch.add(self.fn(x), x, alpha=2)


class _NoResidual(LocusResidual):
    def forward(self, x):
        return self.fn(x)


class _Concat(LocusResidual):
    def forward(self, x):
        return self.fn(x) - x


class _Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = locuslab(8, 1, 3, 2)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


_no_stats = functools.partial(nn.BatchNorm2d, track_running_stats=False)

REFUSED = {
    "training mode": (lambda: locuslab(8, 2, 3, 2).train(), r"2: expected eval mode.*model.eval"),
    "one BatchNorm in training mode": (
        lambda: _one_training(),
        r"4\.0\.fn\.2: expected eval mode, found BatchNorm in training mode; call model.eval\(\)",
    ),
    "dropout in training mode": (
        lambda: nn.Sequential(*randomize(locuslab(8, 1, 3, 2)), nn.Dropout(0.5).train()),
        r"expected eval mode, found dropout in training mode",
    ),
    "BatchNorm without statistics": (
        lambda: locuslab(8, 1, 3, 2, norm=_no_stats).eval(),
        r"expected a BatchNorm with running statistics, found one without",
    ),
    "strided depthwise": (
        lambda: randomize(
            nn.Sequential(
                *locuslab(8, 1, 3, 2)[:3],
                nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
                nn.GELU(),
                nn.BatchNorm2d(8),
            )
        ),
        r"layer 0, depthwise \(3\): expected a depthwise.*stride 1.*found.*stride \(2, 2\)",
    ),
    "grouped, not depthwise": (
        lambda: _layer_with(depthwise=nn.Conv2d(8, 8, 3, padding="same", groups=4)),
        r"layer 1, depthwise.*found a convolution of kernel \(3, 3\).*groups 4",
    ),
    "oblong kernel": (
        lambda: _layer_with(depthwise=nn.Conv2d(8, 8, (3, 5), padding="same", groups=8)),
        r"square kernel.*found a convolution of kernel \(3, 5\)",
    ),
    "dense convolution instead of depthwise": (
        lambda: _layer_with(depthwise=nn.Conv2d(8, 8, 3, padding="same")),
        r"layer 1 \(4\.0\.fn\.0\): expected a depthwise convolution.*or the head",
    ),
    "reflecting padding": (
        lambda: _layer_with(
            depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect")
        ),
        r"layer 1 .*expected a depthwise convolution.*found a pad",
    ),
    "even kernel, padded by hand": (
        lambda: _layer_with(
            depthwise=nn.Sequential(nn.ZeroPad2d((2, 1, 2, 1)), nn.Conv2d(8, 8, 4, groups=8))
        ),
        r"layer 1 .*expected a depthwise convolution.*found a pad",
    ),
    "Mish": (
        lambda: _layer_with(depthwise_act=nn.Mish()),
        r"layer 1, depthwise \(4\.0\.fn\.1\): expected an activation.*found a mish",
    ),
    "no activation": (
        lambda: _layer_with(pointwise_act=nn.Identity()),
        r"layer 1, pointwise .*expected an activation.*found a batch_norm",
    ),
    "GroupNorm": (
        lambda: _layer_with(depthwise_norm=nn.GroupNorm(2, 8)),
        r"layer 1, depthwise \(4\.0\.fn\.2\): expected BatchNorm, found a group_norm",
    ),
    "LayerNorm in the stem": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.GELU(), nn.GroupNorm(1, 8)).eval(),
        r"stem \(2\): expected BatchNorm, found a group_norm",
    ),
    "residual scaled": (lambda: _layer_with(residual=_Scaled), r"a sum weighted by 2"),
    "no residual": (
        lambda: _layer_with(residual=_NoResidual),
        r"layer 1, depthwise .*expected the sum with the layer's input, found a conv2d",
    ),
    "residual subtracted": (
        lambda: _layer_with(residual=_Concat),
        r"expected the sum with the layer's input, found a sub",
    ),
    "grouped pointwise": (
        lambda: _layer_with(pointwise=nn.Conv2d(8, 8, 1, groups=2)),
        r"layer 1, pointwise \(4\.1\): expected a pointwise convolution.*groups 2",
    ),
    "3x3 instead of pointwise": (
        lambda: _layer_with(pointwise=nn.Conv2d(8, 8, 3, padding=1)),
        r"layer 1, pointwise .*found a convolution of kernel \(3, 3\)",
    ),
    "overlapping patches": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.BatchNorm2d(8)).eval(),
        r"stem \(0\): expected a patch convolution.*found a convolution of kernel \(7, 7\)",
    ),
    "nothing after the stem's activation": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.ReLU()).eval(),
        r"stem .*expected BatchNorm, found the model's output",
    ),
    "an MLP": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(),
        r"expected a patch convolution, found no convolution",
    ),
    "no tensors": (nn.Identity, r"expected a patch convolution, found no convolution"),
    "autocast inside": (lambda: randomize(_Autocast()), r"found torch.autocast in its forward"),
    "TorchScript": (
        lambda: torch.jit.trace(randomize(locuslab(8, 1, 3, 2)), torch.zeros(1, 3, 8, 8)),
        r"TorchScript module.*nn.Module that it was scripted from",
    ),
    "meta device": (
        lambda: locuslab(8, 1, 3, 2).eval().to("meta"),
        r"meta device.*load its weights first",
    ),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(randomize(locuslab(8, 1, 3, 2))),
        r"6: expected floating-point weights, found the quantised module Linear",
    ),
    "two inputs": (lambda: _TwoInputs().eval(), r"a model of one input.*found one of 2: x, y;"),
}


def _one_training():
    model = randomize(locuslab(8, 3, 3, 2))
    model[4][0].fn[2].train()
    return model


class _TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, 2)

    def forward(self, x, y):
        return self.conv(x) + y


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_names_the_first_place_that_differs(name):
    build, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        recognize(build())


@pytest.mark.timm
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_refuses_other_networks(name):
    with pytest.raises(UnsupportedModelError, match="stem .*expected"):
        recognize(timm_model(name))


class _Functional(nn.Module):
    """What is built by a function of its own parameters."""

    def __init__(self, forward):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 2, 2))
        self.norm = nn.BatchNorm2d(8)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda m, x: F.conv2d(torch.ones(1, 3, 4, 4), m.weight).mean() + x,
            "expected a patch convolution .*found no convolution that depends on the image",
        ),
        (
            lambda m, x: F.conv_transpose2d(x, m.weight.transpose(0, 1)),
            r"stem .*expected a patch convolution .*found a conv_transpose2d",
        ),
        (
            lambda m, x: F.conv2d(x, m.weight * x.mean(), stride=2),
            "expected constant weights, found weights that depend on the image",
        ),
        (
            lambda m, x: (F.conv2d(x, m.weight, stride=2), x * 0)[1],
            "expected an activation .*found nothing",
        ),
        (
            lambda m, x: F.conv2d(x[0], m.weight, stride=2),
            "expected|could not be traced",
        ),
    ],
    ids=["constant", "transposed", "dynamic", "unused", "unbatched"],
)
def test_refuses_what_functions_compute(forward, message):
    with pytest.raises(UnsupportedModelError, match=message):
        recognize(_Functional(forward).eval())


def test_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        optimize(F.relu)


def test_a_head_that_reads_inside_the_layers_is_refused():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = locuslab(8, 1, 3, 2)

        def forward(self, x):
            x = self.model[:3](x)
            inner = self.model[3][0](x)
            return self.model[3][1:](inner), inner

    with pytest.raises(UnsupportedModelError, match=r"layer 0, pointwise.*also the model's output"):
        recognize(randomize(Inside()))
