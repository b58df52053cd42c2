"""ConvMixers with parts of people's own: each computes what its source does, on every backend."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import VARIATIONS, Variation, locuslab


class Function(nn.Module):
    """An activation written by hand."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


BY_HAND: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "gelu": ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    "gelu-reordered": ("gelu", lambda x: 0.5 * x * (1.0 + torch.erf(x * 0.7071067811865476))),
    "gelu-tanh": (
        "gelu_tanh",
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "silu": ("silu", lambda x: x * torch.sigmoid(x)),
    "silu-module": ("silu", lambda x: x.sigmoid().mul(x)),
    "hardswish": ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    "relu-clamp": ("relu", lambda x: x.clamp(min=0)),
    "relu-maximum": ("relu", lambda x: torch.maximum(x, torch.zeros_like(x))),
    "relu6": ("relu6", lambda x: F.hardtanh(x, 0, 6)),
    "leaky-relu": ("leaky_relu", lambda x: torch.where(x > 0, x, 0.01 * x)),
}
"""What each is, and how it is written."""


class FrozenBatchNorm(nn.Module):
    """As detection libraries have it: buffers, and products of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1)
        scale = scale * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        bias = self.bias.reshape(1, -1, 1, 1)
        return x * scale + (bias - self.running_mean.reshape(1, -1, 1, 1) * scale)


class ScaledNorm(nn.Module):
    """BatchNorm, then LayerScale, then all that is done to a channel besides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (1 - (self.gamma * self.norm(x) - 0.25) / 2).mul_(3)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1)
        self.expand = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(pooled))))


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(x.new_full((len(x), 1, 1, 1), 0.8)) if self.training else x


def _with(part: Callable[[], nn.Module], *, branch: bool = True, after: bool = True) -> nn.Module:
    model = locuslab(16, 3, 3, 4)
    for layer in model[3:6]:
        if branch:
            layer[0].fn.append(part())
        if after:
            layer.append(part())
    return model


def _normalised_before_activation() -> nn.Module:
    model = locuslab(16, 2, 3, 4)
    for layer in model[3:5]:
        layer[0].fn = nn.Sequential(layer[0].fn[0], layer[0].fn[2], layer[0].fn[1])
        layer[2], layer[3] = layer[3], layer[2]
    return model


def _stages() -> nn.Module:
    first, second = locuslab(8, 2, 3, 4), locuslab(16, 2, 5, 4)
    between = nn.Sequential(nn.Conv2d(8, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*first[:5], between, *second[3:])


def _decoder(*head: nn.Module) -> nn.Module:
    return nn.Sequential(*locuslab(16, 2, 3, 4)[:5], *head)


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class SuperResolution(nn.Module):
    """A sum with the stem's output after all layers, and one with the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = locuslab(16, 3, 3, 1)
        self.conv, self.up = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.body[:3](x)
        y = self.conv(self.body[3:6](stem)) + stem
        return F.pixel_shuffle(self.up(y), 2) + F.interpolate(x, scale_factor=2)


class FlipAveraging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = locuslab(16, 2, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x) + self.model(x.flip(3))) / 2


class Pyramid(nn.Module):
    """Returns what ``head`` makes of the outputs of the stem and of all four layers."""

    def __init__(self, head: Callable[[list[Tensor]], object]) -> None:
        super().__init__()
        self.body, self.head = locuslab(16, 4, 3, 4), head

    def forward(self, x: Tensor) -> object:
        maps = [self.body[:3](x)]
        for layer in self.body[3:7]:
            maps.append(layer(maps[-1]))
        return self.head(maps)


class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU6(),
            nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU6(),
            nn.Conv2d(32, 16, 1, bias=False),
            nn.BatchNorm2d(16),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class AttentionPooling(nn.Module):
    """Tokens of the map, a learned query, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.linear = nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 3)
        self.keys, self.values = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        query = self.query.expand(x.shape[0], -1, -1)
        # Of one head: PyTorch exports attention to ONNX where heads are a dimension.
        parts = (part[:, None] for part in (query, self.keys(tokens), self.values(tokens)))
        return self.linear(F.scaled_dot_product_attention(*parts)[:, 0, 0])


class FeaturePyramid(nn.Module):
    """Sums of 1 x 1 convolutions of several maps, from the deepest on, as a named tuple."""

    class Levels(NamedTuple):
        fine: Tensor
        coarse: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = Pyramid(lambda maps: maps)
        self.lateral = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> "FeaturePyramid.Levels":
        maps = self.body(x)[2:]
        level = self.lateral[2](maps[2])
        levels = [level]
        for lateral, features in zip(self.lateral[1::-1], maps[1::-1], strict=True):
            level = level + lateral(features)
            levels.append(level)
        return self.Levels(fine=levels[2], coarse=F.max_pool2d(levels[0], 2))


class UNet(nn.Module):
    """Concatenates the image, the stem's output and the last map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = locuslab(16, 3, 3, 2)
        self.up, self.out = nn.ConvTranspose2d(32, 8, 2, 2), nn.Conv2d(11, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.body[:3](x)
        features = self.body[3:6](stem)
        return self.out(torch.cat((F.relu(self.up(torch.cat((stem, features), 1))), x), 1))


class OfDifferentLayers(nn.Module):
    """Kernel, dilation, activation, width and order of norm and activation change on the way."""

    def __init__(self) -> None:
        super().__init__()
        first, second = locuslab(8, 1, 3, 4, act=nn.SiLU), locuslab(8, 1, 5, 4, dilation=2)
        third = locuslab(8, 1, 7, 4, act=nn.ReLU, norm=FrozenBatchNorm)
        wider = nn.Sequential(third[3][0], nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.LeakyReLU())
        self.body = nn.Sequential(*first[:4], second[3], wider)
        self.linear = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.body(x).mean((2, 3)))


@dataclass
class Output:
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class LikeTransformers(nn.Module):
    """A dataclass as output, and optional arguments besides the image."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Pyramid(lambda maps: maps)
        self.linear = nn.Linear(16, 3)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool = True
    ) -> Output:
        maps = self.model(pixel_values)
        return Output(self.linear(maps[-1].mean((2, 3))), hidden_states=tuple(maps[:2]))


_LARGE = (2, 3, 40, 52)

VARIANTS: dict[str, Variation] = {
    **{
        f"{name}-by-hand": Variation(
            lambda f=function: locuslab(8, 2, 3, 4, act=lambda: Function(f))
        )
        for name, (_, function) in BY_HAND.items()
    },
    "frozen-batchnorm": Variation(lambda: locuslab(16, 2, 5, 4, norm=FrozenBatchNorm)),
    "layer-scale": Variation(lambda: locuslab(16, 2, 5, 4, norm=ScaledNorm)),
    "batchnorm-before-activation": Variation(_normalised_before_activation),
    "dilation-2": Variation(lambda: locuslab(16, 2, 5, 4, dilation=2), _LARGE),
    "dilation-3-even": Variation(lambda: locuslab(16, 2, 4, 4, dilation=3), _LARGE),
    "squeeze-excite-in-branch": Variation(lambda: _with(SqueezeExcite, after=False)),
    "squeeze-excite-after": Variation(lambda: _with(SqueezeExcite, branch=False)),
    "squeeze-excite-twice": Variation(lambda: _with(SqueezeExcite)),
    "drop-path": Variation(lambda: _with(DropPath)),
    "two-stages": Variation(_stages),
    "decoder": Variation(
        lambda: _decoder(
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 5, 1)
        )
    ),
    "separable-decoder": Variation(
        lambda: _decoder(
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 5, 1),
        )
    ),
    "grouped-decoder": Variation(
        lambda: _decoder(nn.Conv2d(16, 8, 3, padding=1, groups=4), nn.GELU(), nn.Conv2d(8, 5, 1))
    ),
    "transposed-decoder": Variation(
        lambda: _decoder(nn.ConvTranspose2d(16, 8, 4, 4), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))
    ),
    "residual-decoder": Variation(lambda: _decoder(ResidualBlock(), nn.Conv2d(16, 3, 1))),
    "pooled-convolutions": Variation(
        lambda: _decoder(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(16, 16, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
    ),
    "inverted-residual-decoder": Variation(
        lambda: _decoder(InvertedResidual(), InvertedResidual(), nn.Conv2d(16, 3, 1))
    ),
    "attention-pooling": Variation(lambda: _decoder(AttentionPooling())),
    "feature-pyramid": Variation(FeaturePyramid),
    "u-net": Variation(UNet, (2, 3, 12, 18)),
    "different-layers": Variation(OfDifferentLayers, _LARGE),
    "super-resolution": Variation(SuperResolution, (2, 3, 9, 11)),
    "flip-averaging": Variation(FlipAveraging),
    "maps-in-a-list": Variation(lambda: Pyramid(lambda maps: maps)),
    "maps-in-a-dictionary": Variation(lambda: Pyramid(lambda maps: {"a": maps[1], "b": maps[3]})),
    "first-map": Variation(lambda: Pyramid(lambda maps: maps[1])),
    "map-written-into": Variation(lambda: Pyramid(lambda maps: [F.relu_(maps[2]), maps[4]])),
    "like-transformers": Variation(LikeTransformers),
}
EVERY = VARIATIONS | VARIANTS
IN_EVERY_RUN = set(EVERY) - {
    *(f"{name}-by-hand" for name in BY_HAND if name not in ("gelu", "gelu-tanh", "relu-maximum")),
    *("reference-gelu-tanh", "reference-4-channels", "compiled", "kernel-1", "kernel-3"),
    *("squeeze-excite-in-branch", "squeeze-excite-after", "dilation-2", "grouped-decoder"),
    *("transposed-decoder", "residual-decoder", "maps-in-a-dictionary", "drop-path"),
    *("reference-max", "reference-grey", "locuslab-relu-in-place", "no-affine", "no-bias"),
    *("width-67", "patch-1", "relu-maximum-by-hand", "first-map", "separable-decoder"),
    *("pooled-convolutions", "viewing-head", "squeezed-head", "spectral-norm"),
}
"""The others are like one of these: ``make test-all`` runs them."""

ONE_OF_EACH_KIND = {
    *("reference", "labml", "reference-depth-0", "shared-layers", "two-heads", "in-place-head"),
    *("segmentation-head", "normalized-in-front", "untraceable-in-front", "kernel-31"),
    *("dilation-3-even", "layer-scale", "squeeze-excite-twice", "maps-in-a-list"),
    *("like-transformers", "flip-averaging", "gelu-by-hand", "compiled"),
}
"""Of how they are written, for what does not depend on numbers."""
