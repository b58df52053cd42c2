"""timm's ConvMixers, where timm can be imported."""

import functools
import importlib.util

import torch
from torch import nn

_keep_alive = []


def has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


@functools.cache
def import_timm():
    # A torchvision whose compiled part does not load beside this build of torch cannot
    # be imported until the two operations that it expects there are declared.
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep_alive.append(library)
    import timm

    return timm


def timm_model(name: str, **kwargs) -> nn.Module:
    return import_timm().create_model(name, **kwargs).eval()


def timm_convmixer(*args, **kwargs) -> nn.Module:
    import_timm()
    from timm.models.convmixer import ConvMixer

    return ConvMixer(*args, **kwargs).eval()


def timm_transform(preprocessing):
    import_timm()
    from timm.data import create_transform

    return create_transform(
        (3, preprocessing.image_size, preprocessing.image_size),
        interpolation="bicubic",
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
    )
