"""timm's ConvMixers, where timm can be imported."""

import importlib.util

from torch import nn

from convmixer_fast.benchmarks.model_cases import import_timm


def has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


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
