"""The standard run: what ``make bench`` measures, in order of worth, within a number of minutes."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from convmixer_fast.benchmarks import (
    bench_depthwise_block,
    bench_model,
    bench_patch_embed,
    bench_pointwise_block,
)
from convmixer_fast.benchmarks.model_cases import SCALE, named_case, scale_case
from convmixer_fast.benchmarks.subjects import Case
from convmixer_fast.models.published import PUBLISHED

__all__ = ["standard_cases"]

_OPS = ("eager", "eager-nhwc", "eager-cudnn-benchmark", "compile-nhwc", "replknet", "ours")
_SWEEP = {
    "batch": (4, 16, 64),
    "image_size": (16, 64, 128),
    "dim": (64, 128, 512),
    "depth": (2, 4, 16),
}
_LOW_PRECISION = (
    ("convmixer_768_32", 1),
    ("cifar_256_8", 1),
    ("cifar_256_8", 64),
    ("convmixer_1024_20_ks9_p14", 1),
    ("convmixer_1536_20", 1),
    ("digits", 64),
)
_IN_8_BITS = (
    "eager",
    *("onnxruntime-int8", "onnxruntime-int8-depthwise"),
    *("openvino-int8", "openvino-int8-depthwise"),
    "ours",
)
_IN_BFLOAT16 = ("eager", "compile", "openvino-bf16", "ours")
_GROWTH = ("eager", "compile", "ours")
_GROWTH_ON_CPU = ("eager", "onnxruntime", "ours")


def standard_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases for ``device``: models, ops, models for scale, how cost grows."""
    cuda = device.type == "cuda"
    large, small = (64, 1024) if cuda else (4, 64)
    yield named_case("convmixer_768_32", 1, dtype)
    yield named_case("cifar_256_8", 1, dtype)
    yield named_case("cifar_256_8", small, dtype)
    yield named_case("convmixer_1024_20_ks9_p14", 1, dtype)
    yield named_case("convmixer_1536_20", 1, dtype)
    yield named_case("digits", 1, dtype)
    yield named_case("digits", small, dtype)
    if not cuda and dtype == torch.float32:
        yield from _smaller_numbers()
    # With operations of PyTorch's before and after: two owners of threads may disturb each other.
    yield named_case("cifar_256_8 normalised", 16, dtype)
    yield named_case("cifar_256_8 with a head of two layers", 1, dtype)
    batch = large if cuda else 1
    for bench in (bench_depthwise_block, bench_pointwise_block, bench_patch_embed):
        yield from bench.cases(batch, dtype, _OPS)
    for name in SCALE:
        yield scale_case(name, batch, dtype)
    # Building takes torch.compile longer on a CPU than all the others take to be measured.
    yield from bench_model.growth(dtype, _SWEEP, _GROWTH if cuda else _GROWTH_ON_CPU)
    for name in PUBLISHED if cuda else ("convmixer_768_32",):
        yield named_case(name, large, dtype)


def _smaller_numbers() -> Iterator[Case]:
    """Yield the cases of a CPU in 8-bit numbers, with float32 beside, and in bfloat16."""
    for name, batch in _LOW_PRECISION:
        yield replace(named_case(name, batch, torch.float32, _IN_8_BITS), int8=True)
    for name, batch in _LOW_PRECISION:
        yield named_case(name, batch, torch.bfloat16, _IN_BFLOAT16)
