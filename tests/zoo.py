"""ConvMixers as people write them, each with random weights and random BatchNorm statistics."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from convmixer_fast import ConvMixer
from convmixer_fast.models.randomize import randomize


class LocusResidual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def locuslab(
    dim: int,
    depth: int,
    kernel_size: int = 9,
    patch_size: int = 7,
    n_classes: int = 10,
    act: Callable[[], nn.Module] = nn.GELU,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    bias: bool = True,
    stem_chans: int = 3,
    **depthwise: object,
) -> nn.Sequential:
    """The model as one Sequential, with the parts that tests vary as arguments."""
    options = {"padding": "same", "groups": dim, **depthwise}

    def layer() -> nn.Module:
        return nn.Sequential(
            LocusResidual(
                nn.Sequential(
                    nn.Conv2d(dim, dim, kernel_size, bias=bias, **options), act(), norm(dim)
                )
            ),
            nn.Conv2d(dim, dim, kernel_size=1, bias=bias),
            act(),
            norm(dim),
        )

    return nn.Sequential(
        nn.Conv2d(stem_chans, dim, kernel_size=patch_size, stride=patch_size, bias=bias),
        act(),
        norm(dim),
        *[layer() for _ in range(depth)],
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(dim, n_classes),
    )


def tweetable(h: int, d: int, k: int, p: int, n: int) -> nn.Sequential:
    """The short version: an anonymous Sequential subclass holds the residual."""
    S, C, A = nn.Sequential, nn.Conv2d, lambda x: nn.Sequential(x, nn.GELU(), nn.BatchNorm2d(h))
    R = type("", (S,), {"forward": lambda s, x: s[0](x) + x})
    return S(
        A(C(3, h, p, p)),
        *[S(R(A(C(h, h, k, groups=h, padding=k // 2))), A(C(h, h, 1))) for i in range(d)],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(h, n),
    )


class LabmlLayer(nn.Module):
    def __init__(self, d_model: int, kernel_size: int) -> None:
        super().__init__()
        self.depth_wise_conv = nn.Conv2d(
            d_model, d_model, kernel_size, groups=d_model, padding=(kernel_size - 1) // 2
        )
        self.act1 = nn.GELU()
        self.norm1 = nn.BatchNorm2d(d_model)
        self.point_wise_conv = nn.Conv2d(d_model, d_model, kernel_size=1)
        self.act2 = nn.GELU()
        self.norm2 = nn.BatchNorm2d(d_model)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm1(self.act1(self.depth_wise_conv(x)))
        x += residual
        return self.norm2(self.act2(self.point_wise_conv(x)))


class LabmlPatchEmbeddings(nn.Module):
    def __init__(self, d_model: int, patch_size: int, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, d_model, kernel_size=patch_size, stride=patch_size)
        self.act = nn.GELU()
        self.norm = nn.BatchNorm2d(d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.conv(x)))


class LabmlHead(nn.Module):
    def __init__(self, d_model: int, n_classes: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.linear = nn.Linear(d_model, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(x)[:, :, 0, 0])


class Labml(nn.Module):
    def __init__(self, d_model: int = 24, n_layers: int = 2, kernel_size: int = 7) -> None:
        super().__init__()
        self.patch_emb = LabmlPatchEmbeddings(d_model, 4, 3)
        self.conv_mixer_layers = nn.ModuleList(
            LabmlLayer(d_model, kernel_size) for _ in range(n_layers)
        )
        self.classification = LabmlHead(d_model, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_emb(x)
        for layer in self.conv_mixer_layers:
            x = layer(x)
        return self.classification(x)


class Trunk(nn.Module):
    """A ConvMixer's trunk under a head that is a function."""

    def __init__(self, head: Callable[["Trunk", Tensor, Tensor], object], dim: int = 24) -> None:
        super().__init__()
        self.body = ConvMixer(dim, 2, kernel_size=5, patch_size=4, num_classes=0, global_pool="")
        self.linear = nn.Linear(dim, 5)
        self.other = nn.Linear(dim, 3)
        self.conv = nn.Conv2d(dim, 6, 1)
        self.head = head

    def forward(self, x: Tensor) -> object:
        return self.head(self, self.body(x), x)


def _two_heads(m: Trunk, f: Tensor, x: Tensor) -> object:
    pooled = f.mean((-2, -1))
    return {"coarse": m.linear(pooled), "fine": (m.other(pooled), f)}


def _segmentation(m: Trunk, f: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(m.conv(f), size=x.shape[2:], mode="bilinear")


def _squeezed(m: Trunk, f: Tensor, x: Tensor) -> Tensor:
    return m.linear(F.adaptive_avg_pool2d(f, 1).squeeze())


def _views(m: Trunk, f: Tensor, x: Tensor) -> Tensor:
    return m.linear(f.view(f.shape[0], f.shape[1], -1).mean(-1)).view(x.size(0), -1)


def _writes_in_place(m: Trunk, f: Tensor, x: Tensor) -> Tensor:
    f.flatten(2).mul_(0.5)
    return m.linear(f.mean((2, 3))).softmax(-1)


class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.48, 0.46, 0.41]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.23, 0.22, 0.23]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class CheckedNormalize(Normalize):
    """Normalises behind a check on values, which cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if (self.std == 0).any():
            raise ValueError("std is zero")
        return super().forward(x)


class Normalized(nn.Module):
    """A model that normalises its images in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.model = locuslab(16, 2, 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalize(x))


class SharedLayers(nn.Module):
    """One layer applied several times."""

    def __init__(self, times: int = 3) -> None:
        super().__init__()
        self.model = ConvMixer(16, 1, kernel_size=3, patch_size=2, num_classes=4)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.stem(x)
        for _ in range(self.times):
            x = self.model.blocks(x)
        return self.model.forward_head(x)


class NoGrad(nn.Module):
    """A model whose author put no_grad() inside and takes its inputs as ``*images``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = locuslab(16, 2, 3, 2)

    @torch.no_grad()
    def forward(self, *images: Tensor) -> Tensor:
        return self.model(*images)


def _weight_normed() -> nn.Module:
    model = locuslab(16, 2, 5, 4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrizations.weight_norm(module)
    return model


def _spectral_normed() -> nn.Module:
    model = locuslab(16, 2, 5, 4)
    parametrizations.spectral_norm(model[3][1])
    return model


def _with_dropout() -> nn.Module:
    model = locuslab(16, 2, 5, 4)
    model[3].insert(1, nn.Dropout2d(0.3))
    model[3].append(nn.Identity())
    model.insert(3, nn.Dropout(0.5))
    model.insert(0, nn.Identity())
    return model


@dataclass(frozen=True)
class Variation:
    """A model and an input that it takes, neither square nor a whole number of patches."""

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int] = (2, 3, 30, 37)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return randomize(self.build())

    def image(self, seed: int = 1) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))


_TANH = functools.partial(nn.GELU, approximate="tanh")
_small = functools.partial(ConvMixer, 24, 2, kernel_size=5, patch_size=4, num_classes=7)

VARIATIONS: dict[str, Variation] = {
    "reference": Variation(_small),
    "reference-relu": Variation(functools.partial(_small, act_layer=nn.ReLU)),
    "reference-gelu-tanh": Variation(functools.partial(_small, act_layer=_TANH)),
    "reference-max": Variation(functools.partial(_small, global_pool="max")),
    "reference-avgmax": Variation(functools.partial(_small, global_pool="avgmax")),
    "reference-catavgmax": Variation(functools.partial(_small, global_pool="catavgmax")),
    "reference-no-classifier": Variation(functools.partial(_small, num_classes=0)),
    "reference-no-pool": Variation(functools.partial(_small, num_classes=0, global_pool="")),
    "reference-grey": Variation(functools.partial(_small, in_chans=1), (2, 1, 30, 37)),
    "reference-4-channels": Variation(functools.partial(_small, in_chans=4), (2, 4, 30, 37)),
    "reference-depth-0": Variation(lambda: ConvMixer(8, 0, patch_size=4, num_classes=3)),
    "locuslab": Variation(lambda: locuslab(24, 3, 7, 4)),
    "locuslab-relu-in-place": Variation(
        lambda: locuslab(24, 2, 5, 4, act=functools.partial(nn.ReLU, inplace=True))
    ),
    "tweetable": Variation(lambda: tweetable(24, 2, 5, 4, 10)),
    "labml": Variation(Labml),
    "no-bias": Variation(lambda: locuslab(16, 2, 5, 4, bias=False)),
    "no-affine": Variation(
        lambda: locuslab(16, 2, 5, 4, norm=functools.partial(nn.BatchNorm2d, affine=False))
    ),
    "batchnorm-eps": Variation(
        lambda: locuslab(16, 2, 5, 4, norm=functools.partial(nn.BatchNorm2d, eps=0.1))
    ),
    "dropout-and-identity": Variation(_with_dropout),
    "weight-norm": Variation(_weight_normed),
    "spectral-norm": Variation(_spectral_normed),
    "shared-layers": Variation(SharedLayers),
    "no-grad-inside": Variation(NoGrad),
    "two-heads": Variation(lambda: Trunk(_two_heads)),
    "segmentation-head": Variation(lambda: Trunk(_segmentation)),
    "squeezed-head": Variation(lambda: Trunk(_squeezed)),
    "viewing-head": Variation(lambda: Trunk(_views)),
    "in-place-head": Variation(lambda: Trunk(_writes_in_place)),
    "headless": Variation(lambda: Trunk(lambda m, f, x: f)),
    "normalized-in-front": Variation(lambda: nn.Sequential(Normalize(), locuslab(16, 2, 5, 4))),
    "untraceable-in-front": Variation(
        lambda: nn.Sequential(CheckedNormalize(), locuslab(16, 2, 5, 4))
    ),
    "normalized-inside": Variation(Normalized),
    "data-parallel": Variation(lambda: nn.DataParallel(locuslab(16, 2, 5, 4))),
    "compiled": Variation(lambda: torch.compile(locuslab(16, 2, 5, 4), backend="eager")),
    "compiled-inside": Variation(
        lambda: nn.Sequential(Normalize(), torch.compile(locuslab(16, 2, 5, 4), backend="eager"))
    ),
    "width-1": Variation(lambda: locuslab(1, 2, 3, 2)),
    "width-67": Variation(lambda: locuslab(67, 1, 3, 5)),
    "patch-1": Variation(lambda: locuslab(16, 2, 5, 1), (2, 3, 9, 7)),
    "even-kernel-same": Variation(lambda: locuslab(16, 2, 4, 4)),
    **{f"kernel-{k}": Variation(lambda k=k: locuslab(8, 1, k, 2)) for k in (1, 3, 9, 15, 31)},
}
