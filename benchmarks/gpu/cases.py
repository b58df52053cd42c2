"""Whole models on a GPU, in order of worth: ``python -m benchmarks.gpu.cases models``."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from convmixer_fast.benchmarks.gpu.models import TINY_INPUT, tiny_model
from convmixer_fast.benchmarks.gpu.plan import RESTART
from convmixer_fast.benchmarks.harness import DeviceLostError, Settings
from convmixer_fast.benchmarks.model_cases import convmixer_case, named_case, scale_case
from convmixer_fast.benchmarks.runs import Run
from convmixer_fast.benchmarks.subjects import Case
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize

__all__ = ["model_cases", "peer_cases", "rehearsal_cases"]

_EAGER = ("eager", "eager-nhwc", "eager-cudnn-benchmark")
_QUICK = (*_EAGER, "ours")
_CHUNKS = (*_QUICK, "ours-triton-chunks")
_LATENCY = ("eager", "eager-graph", "ours")
_COMPILED = ("compile", "compile-nhwc", "ours")
_AUTOTUNED = ("compile-max-autotune", "tensorrt", "ours")
_LARGE = ("convmixer_768_32", "convmixer_1536_20", "convmixer_1024_20_ks9_p14")


def model_cases() -> Iterator[Case]:
    """Yield the published models and CIFAR's beside what is built at once."""
    half = torch.float16
    for name in _LARGE:
        yield named_case(name, 64, half, only=_CHUNKS)
    yield named_case("convmixer_768_32", 1, half, only=_LATENCY)
    yield named_case("cifar_256_8", 1024, half, only=_QUICK)
    yield named_case("cifar_256_8", 1, half, only=_LATENCY)
    for name in _LARGE[1:]:
        yield named_case(name, 1, half, only=_LATENCY)
    yield named_case("convmixer_768_32", 256, half, only=_CHUNKS)
    gelu = Architecture(768, 32, 7, 7, "gelu")
    yield convmixer_case(
        "768/32 with GELU", lambda: randomize(gelu.build()), (64, 3, 224, 224), half, only=_QUICK
    )
    for dtype in (torch.bfloat16, torch.float32):
        yield named_case("convmixer_768_32", 64, dtype, only=_QUICK)
    for name in _LARGE[1:]:
        yield named_case(name, 256, half, only=_QUICK)


def peer_cases() -> Iterator[Case]:
    """Yield them beside what takes long to build, and models for scale."""
    half = torch.float16
    for name in _LARGE:
        yield named_case(name, 64, half, only=_COMPILED, suffix=", compiled peers")
    yield scale_case("vit_base_patch16_224", 64, half)
    yield named_case("convmixer_768_32", 1, half, only=_COMPILED, suffix=", compiled peers")
    yield named_case("cifar_256_8", 1024, half, only=_COMPILED, suffix=", compiled peers")
    for name in _LARGE[:2]:
        yield named_case(name, 64, half, only=_AUTOTUNED, suffix=", autotuned peers")
    yield scale_case("resnet50", 64, half)


def rehearsal_cases() -> Iterator[Case]:
    """Yield the model of a rehearsal in each dtype."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        yield convmixer_case(
            "8/2",
            tiny_model,
            TINY_INPUT,
            dtype,
            only=("eager", "eager-nhwc", "ours-triton"),
        )


def main() -> int:
    """Measure one part into ``models.json`` and ``.csv``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cases", description=__doc__)
    parser.add_argument("part", choices=("models", "peers"))
    parser.add_argument("--output", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--seconds", type=float, default=80.0, help="no case is begun later")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, tiny")
    arguments = parser.parse_args()
    settings = Settings(
        seconds=0.2 if arguments.rehearse else 1.2,
        min_rounds=2 if arguments.rehearse else 4,
        deadline=time.monotonic() + arguments.seconds,
    )
    parts = {"models": model_cases, "peers": peer_cases}
    cases = list(rehearsal_cases() if arguments.rehearse else parts[arguments.part]())
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    run = Run(
        device, arguments.output, settings, ceiling_seconds=0.1 if arguments.rehearse else 0.4
    )
    try:
        run.execute("models", cases, "all", quiet=True)
    except DeviceLostError as error:
        print(error, file=sys.stderr, flush=True)
        # Not sys.exit: what runs at exit would use the device that is lost.
        os._exit(RESTART)
    return 0


if __name__ == "__main__":
    sys.exit(main())
