"""What ``make gpu-check`` measures, in order of worth: ``python -m benchmarks.gpu_cases micro``."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from convmixer_fast.benchmarks.harness import DeviceLostError, Settings
from convmixer_fast.benchmarks.model_cases import convmixer_case, named_case, scale_case
from convmixer_fast.benchmarks.op_cases import depthwise_case, patch_embed_case, pointwise_case
from convmixer_fast.benchmarks.runs import Run
from convmixer_fast.benchmarks.subjects import Case
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize

__all__ = ["RESTART", "micro_cases", "model_cases", "rehearsal_cases"]

RESTART = 75
"""The exit status after a candidate that took the device with it: run the command again, and it
goes on with the next one."""

_QUICK = ("eager", "eager-nhwc", "eager-cudnn-benchmark", "ours")
_OPS = (*_QUICK, "compile", "replknet")
_LATENCY = ("eager", "eager-graph", "ours")
_COMPILED = ("eager", "compile", "compile-nhwc", "onnxruntime-cuda", "ours")
_CHUNKS = (*_QUICK, "ours-triton-chunks")
_AUTOTUNED = ("eager", "compile-max-autotune", "compile-max-autotune-nhwc", "tensorrt", "ours")
_ENGINES = ("eager", "tensorrt-engine", "export-tensorrt", "export-tensorrt-triton", "ours")


def micro_cases() -> Iterator[Case]:
    """Yield single ops at batch 64, then other kernels and dtypes, then batch 1."""
    half, batch = torch.float16, 64
    yield depthwise_case(768, 32, 7, batch, half, "relu", only=_OPS)
    yield pointwise_case(768, 32, batch, half, "relu", only=_OPS)
    yield depthwise_case(1536, 32, 9, batch, half, only=_OPS)
    yield pointwise_case(1536, 32, batch, half, only=_OPS)
    yield patch_embed_case(768, 224, 7, batch, half, "relu", only=_OPS)
    yield depthwise_case(1024, 16, 9, batch, half, only=_QUICK)
    yield pointwise_case(1024, 16, batch, half, only=_QUICK)
    yield depthwise_case(256, 16, 5, 1024, half, only=_QUICK)
    yield pointwise_case(256, 16, 1024, half, only=_QUICK)
    for dtype in (torch.bfloat16, torch.float32):
        yield depthwise_case(768, 32, 7, batch, dtype, only=_QUICK)
        yield pointwise_case(768, 32, batch, dtype, only=_QUICK)
    for kernel_size in (7, 3, 5, 9, 11, 15):
        yield depthwise_case(768, 32, kernel_size, batch, half, only=_QUICK)
    yield depthwise_case(768, 32, 7, 1, half, "relu", only=_QUICK)
    yield pointwise_case(768, 32, 1, half, "relu", only=_QUICK)
    yield patch_embed_case(1536, 224, 7, batch, half, only=_QUICK)
    yield patch_embed_case(1024, 224, 14, batch, half, only=_QUICK)


def model_cases() -> Iterator[Case]:
    """Yield the published models, batch 1, then compiled peers, models for scale, dtypes ...

    What takes long to compile stands in cases of its own, behind what does not.
    """
    half = torch.float16
    large = ("convmixer_768_32", "convmixer_1536_20", "convmixer_1024_20_ks9_p14")
    for name in large:
        yield named_case(name, 64, half, only=_CHUNKS)
    yield named_case("convmixer_768_32", 1, half, only=_LATENCY)
    yield named_case("cifar_256_8", 1024, half, only=_QUICK)
    yield named_case("convmixer_768_32", 256, half, only=_CHUNKS)
    for name in large:
        yield named_case(name, 64, half, only=_COMPILED, suffix=", compiled peers")
    yield scale_case("vit_base_patch16_224", 64, half)
    yield named_case("cifar_256_8", 1, half, only=_LATENCY)
    for dtype in (torch.bfloat16, torch.float32):
        yield named_case("convmixer_768_32", 64, dtype, only=_QUICK)
    yield scale_case("resnet50", 64, half)
    for name in large[:2]:
        yield named_case(name, 64, half, only=_AUTOTUNED, suffix=", autotuned peers")
    for name in large[:2]:
        yield named_case(name, 64, half, only=_ENGINES, suffix=", engines")
    yield named_case("convmixer_1536_20", 256, half, only=_QUICK)


def rehearsal_cases(part: str) -> Iterator[Case]:
    """Yield cases so small that Triton's interpreter, on a CPU, can stand in for a GPU."""
    only = ("eager", "eager-nhwc", "ours-triton")
    tiny = Architecture(8, 2, 3, 2, "gelu", num_classes=4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if part == "micro":
            yield depthwise_case(6, 5, 3, 2, dtype, only=only)
            yield pointwise_case(16, 4, 2, dtype, only=only)
            yield patch_embed_case(8, 6, 3, 2, dtype, only=only)
        else:
            yield convmixer_case(
                "8/2", lambda: randomize(tiny.build()), (2, 3, 8, 8), dtype, only=only
            )


def main(
    part: Annotated[str, typer.Argument(help="micro or model.")],
    output: Annotated[Path, typer.Option(help="Folder of the results.")],
    minutes: Annotated[float, typer.Option(help="After which no further case is begun.")],
    rehearse: Annotated[bool, typer.Option(help="On a CPU, in Triton's interpreter.")] = False,
) -> None:
    """Measure one part of the GPU check into ``ops`` or ``models``.json and .csv."""
    settings = Settings(
        seconds=0.2 if rehearse else 1.5,
        min_rounds=2 if rehearse else 10 if part == "micro" else 5,
        deadline=time.monotonic() + 60 * minutes,
    )
    stem, all_cases = {"micro": ("ops", micro_cases), "model": ("models", model_cases)}[part]
    cases = list(rehearsal_cases(part) if rehearse else all_cases())
    device = torch.device("cpu" if rehearse else "cuda")
    ceilings = 0.1 if rehearse else 0.5
    run = Run(device, output, settings, ceiling_seconds=ceilings)
    try:
        run.execute(stem, cases, "all", quiet=True)
    except DeviceLostError as error:
        print(error, file=sys.stderr, flush=True)
        # Not sys.exit: what runs at exit would use the device that is lost.
        os._exit(RESTART)


if __name__ == "__main__":
    typer.run(main)
