"""Whole models as cases: the published ones, small ones, what they are compared with for scale."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from convmixer_fast.benchmarks.subjects import Case, Subject
from convmixer_fast.benchmarks.work import Step, Work, counted_flops, model_steps
from convmixer_fast.choices import BackendName
from convmixer_fast.models.digits import digits_model
from convmixer_fast.models.published import PUBLISHED, Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.optimize import optimize
from convmixer_fast.recognition.recognize import recognize

__all__ = ["MODELS", "SCALE", "convmixer_case", "import_timm", "named_case", "scale_case"]

CIFAR = Architecture(256, 8, 5, 2, "gelu", num_classes=10)


class Normalized(nn.Module):
    """A model behind a normalisation of its images in PyTorch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.mean = nn.Buffer(torch.full((1, 3, 1, 1), 0.45))
        self.std = nn.Buffer(torch.full((1, 3, 1, 1), 0.22))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images to logits."""
        logits: torch.Tensor = self.model((x - self.mean) / self.std)
        return logits


def _with_two_linear_layers() -> nn.Module:
    model: Any = CIFAR.build()
    model.head = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    return randomize(model)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    **{
        name: (lambda a=architecture: randomize(a.build()), (3, 224, 224))  # type: ignore[misc]
        for name, architecture in PUBLISHED.items()
    },
    "cifar_256_8": (lambda: randomize(CIFAR.build()), (3, 32, 32)),
    "cifar_256_8 normalised": (lambda: Normalized(randomize(CIFAR.build())).eval(), (3, 32, 32)),
    "cifar_256_8 with a head of two layers": (_with_two_linear_layers, (3, 32, 32)),
    "digits": (lambda: digits_model()[0], (1, 8, 8)),
}
"""How each is made, and its image (C, H, W). The digits model is trained; others have random
weights, on which times do not depend."""

SCALE = {"vit_base_patch16_224": "ViT-B/16", "resnet50": "ResNet-50"}
"""Models of timm that people know, to set the rates of a ConvMixer beside."""

_SCALE_PROVIDERS = ("eager", "eager-nhwc", "compile", "compile-nhwc")


def named_case(
    name: str,
    batch: int,
    dtype: torch.dtype,
    only: Sequence[str] | None = None,
    suffix: str = "",
) -> Case:
    """Return a case of one of :data:`MODELS`.

    Args:
        name: of the model.
        batch: images.
        dtype: of weights and input.
        only: see :class:`Case`.
        suffix: of the case's name, where one model is run with several sets of providers.
    """
    make, image = MODELS[name]
    case = convmixer_case(name, make, (batch, *image), dtype, only=only)
    return replace(case, name=case.name + suffix)


def convmixer_case(
    name: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    labels: dict[str, str | int] | None = None,
    only: Sequence[str] | None = None,
) -> Case:
    """Return a case of any ConvMixer.

    Args:
        name: of the model.
        make: returns it, in eval mode, of float32 weights, on the CPU.
        shape: (N, C, H, W) of the images.
        dtype: of weights and input.
        labels: more of them than model, image_size and batch.
        only: see :class:`Case`.
    """

    def subject(device: torch.device) -> Subject:
        model = make().to(device, dtype)

        @functools.cache
        def fuse(backend: BackendName, **options: Any) -> nn.Module:
            with torch.inference_mode(False):
                # What is timed is compared with float64 first, as every provider.
                return optimize(model, backend=backend, verify=False, **options)

        with torch.inference_mode(False), torch.no_grad():
            steps = model_steps(recognize(model), shape, dtype.itemsize)
        return Subject(model, shape, Work(steps, shape[0]), fuse)

    return Case(
        bench="model",
        name=f"{name}, {shape[3]} px, batch {shape[0]}",
        labels={"model": name, "image_size": shape[3], "batch": shape[0], **(labels or {})},
        dtype=dtype,
        make=subject,
        only=None if only is None else tuple(only),
    )


def scale_case(name: str, batch: int, dtype: torch.dtype) -> Case:
    """Return a case of one of :data:`SCALE`, at 224 px, by eager PyTorch and torch.compile."""

    def subject(device: torch.device) -> Subject:
        model: nn.Module = import_timm().create_model(name).eval()
        x = torch.empty(1, 3, 224, 224, device="meta")
        with torch.inference_mode(False), torch.no_grad():
            flops = batch * counted_flops(import_timm().create_model(name).to("meta").eval(), x)
        model = model.to(device, dtype)
        moved = dtype.itemsize * sum(p.numel() for p in model.parameters())
        work = Work((Step(flops, float(moved)),), batch)
        return Subject(model, (batch, 3, 224, 224), work, None)

    return Case(
        bench="model",
        name=f"{SCALE[name]}, 224 px, batch {batch}",
        labels={"model": name, "image_size": 224, "batch": batch},
        dtype=dtype,
        make=subject,
        only=_SCALE_PROVIDERS,
    )


_declared: list[torch.library.Library] = []


def import_timm() -> Any:
    """Import timm, also beside a torchvision whose compiled part does not load.

    timm needs nothing of that part, but torchvision cannot be imported until two operations
    that it expects there are declared.

    Raises:
        ImportError: timm is not installed.
    """
    if not _declared:
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)
    import timm

    return timm
