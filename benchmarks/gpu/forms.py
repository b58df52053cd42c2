"""Every form in which a kernel or the whole trunk can run, one published shape each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convmixer_fast import reference
from convmixer_fast.accuracy import LIMITS, relative_error
from convmixer_fast.benchmarks.gpu.models import TINY, TINY_INPUT
from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.patch_embed import patch_embed_triton
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile
from convmixer_fast.kernels.tuned import Problem, Tile
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.optimize import optimize
from convmixer_fast.runtime.sweep import Trial

__all__ = ["Finding", "Form", "check_tile", "forms", "tiny_forms"]


@dataclass(frozen=True)
class Finding:
    """How far a result was from the float64 reference."""

    error: float
    limit: float
    note: str = ""
    """Why there is no result."""

    @property
    def status(self) -> str:
        """``"ok"``, ``"wrong"``, or ``"failed"`` where there is no result."""
        if self.note:
            return "failed"
        return "ok" if self.error <= self.limit else "wrong"


@dataclass(frozen=True)
class Form:
    """One thing to check."""

    name: str
    check: Callable[[torch.device], Finding]


def check_tile(trial: Trial, tile: Tile) -> Finding:
    """Run one tile of a problem."""
    fault = trial.fault(tile)
    raised = fault is not None and not fault.startswith("wrong")
    return Finding(trial.error, trial.limit, fault if raised and fault else "")


def forms() -> Iterator[Form]:
    """Yield the forms, those that the published models run in first."""
    half, bf16, single = "float16", "bfloat16", "float32"
    kinds: tuple[tuple[str, tuple[int, int, int], str, str, Tile | None], ...] = (
        ("depthwise Toeplitz", (768, 32, 7), "relu", half, None),
        ("depthwise Toeplitz", (1536, 32, 9), "gelu", half, None),
        ("depthwise Toeplitz", (1024, 16, 9), "gelu", half, None),
        ("depthwise Toeplitz", (768, 32, 7), "relu", bf16, None),
        ("depthwise Toeplitz", (256, 16, 5), "gelu", half, None),
        ("depthwise Toeplitz, 8 rows", (768, 32, 7), "relu", half, ToeplitzTile(16, 8)),
        ("depthwise Toeplitz, 4 rows", (768, 32, 7), "relu", half, ToeplitzTile(16, 4)),
        ("depthwise Toeplitz, rows ahead", (768, 32, 7), "relu", half, ToeplitzTile(16, 16, 2)),
        ("depthwise Toeplitz, odd plane", (768, 35, 7), "relu", half, None),
        ("depthwise Toeplitz, windows of 32", (768, 32, 15), "relu", half, None),
        ("depthwise direct", (768, 32, 7), "relu", single, None),
        ("depthwise direct", (768, 32, 7), "relu", half, DirectTile(1, 32, 32, None, None, 4)),
        ("depthwise direct, 31 x 31", (64, 32, 31), "relu", half, None),
        ("pointwise TMA", (768, 32, 1), "relu", half, TmaTile(128, 128, 64, False, 8, 3)),
        ("pointwise TMA", (1536, 32, 1), "gelu", bf16, TmaTile(128, 128, 64, False, 8, 3)),
        ("pointwise TMA", (1024, 16, 1), "gelu", half, TmaTile(128, 128, 64, False, 8, 3)),
        ("pointwise TMA, small", (768, 32, 1), "relu", half, TmaTile(64, 64, 64, False, 4, 4)),
        (
            "pointwise TMA, persistent",
            (768, 32, 1),
            "relu",
            half,
            TmaTile(128, 256, 64, True, 8, 3),
        ),
        ("pointwise pointers", (768, 32, 1), "relu", half, PointerTile(128, 128, 64, 8, 3)),
        ("pointwise pointers, odd plane", (768, 7, 1), "relu", half, None),
        ("pointwise pointers", (768, 32, 1), "relu", single, None),
    )
    for name, (channels, side, size), activation, dtype, tile in kinds:
        op = "pointwise_block" if name.startswith("pointwise") else "depthwise_block"
        problem = Problem(op, channels, channels, side, side, size, activation, dtype)
        yield _kernel_form(name, problem, 8, tile)
    for dtype, patch in ((half, 7), (bf16, 7), (half, 14), (half, 1)):
        yield Form(
            f"patch embedding {patch} x {patch}, {dtype}",
            lambda device, d=dtype, p=patch: _patch_embedding(
                device, d, 768, p, 224 if p > 1 else 16
            ),  # type: ignore[misc]
        )
    wide = Architecture(768, 2, 7, 7, "relu"), (16, 3, 224, 224)
    gelu = Architecture(1024, 2, 9, 14, "gelu"), (16, 3, 224, 224)
    cifar = Architecture(256, 2, 5, 2, "gelu", num_classes=10), (64, 3, 32, 32)
    yield from _trunk_forms((wide, gelu, cifar), half)
    yield from _trunk_forms((wide,), bf16)
    yield from _trunk_forms((wide,), single)


def tiny_forms() -> Iterator[Form]:
    """Yield a few so small that Triton's interpreter can stand in for a GPU."""
    for dtype in ("float16", "bfloat16", "float32"):
        problem = Problem("depthwise_block", 6, 6, 8, 8, 3, "gelu", dtype)
        yield _kernel_form("depthwise", problem, 2, None)
        problem = Problem("pointwise_block", 16, 16, 4, 4, 1, "relu", dtype)
        yield _kernel_form("pointwise", problem, 2, None)
        yield Form(
            f"patch embedding 2 x 2, {dtype}",
            lambda device, d=dtype: _patch_embedding(device, d, 8, 2, 8),  # type: ignore[misc]
        )
        yield from _trunk_forms(((TINY, TINY_INPUT),), dtype)


def _kernel_form(name: str, problem: Problem, images: int, tile: Tile | None) -> Form:
    def check(device: torch.device) -> Finding:
        trial = Trial(problem, images, device)
        return check_tile(trial, trial.present if tile is None else tile)

    size = f" k{problem.kernel_size}" if problem.op == "depthwise_block" else ""
    sizes = f"{problem.channels_in} x {problem.height}x{problem.width}{size}"
    return Form(f"{name}: {sizes} {problem.activation}, {problem.dtype}", check)


def _patch_embedding(
    device: torch.device, dtype_name: str, channels: int, patch: int, side: int
) -> Finding:
    dtype: torch.dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, weight = random(4, 3, side, side), random(channels, 3, patch, patch) / (2 * patch)
    bias, scale, shift = (random(channels) for _ in range(3))
    exact = reference.patch_embed_ref(
        x.double(), weight.double(), bias.double(), scale.double(), shift.double(), "relu"
    )
    out = patch_embed_triton(x, weight, bias, scale, shift, "relu")
    return Finding(relative_error(out, exact), LIMITS[dtype])


_Shape = tuple[int, int, int, int]


def _trunk_forms(models: tuple[tuple[Architecture, _Shape], ...], dtype: str) -> Iterator[Form]:
    ways: dict[str, dict[str, Any]] = {
        "launches": {"cuda_graphs": False},
        "graph": {},
        "chunks": {"chunk": 2},
        "features": {},
        "channels-last input": {},
    }
    for architecture, shape in models:
        for way, options in ways.items():
            yield Form(
                f"trunk {architecture.dim}/{architecture.kernel_size}, {way}, {dtype}",
                lambda device, a=architecture, s=shape, w=way, o=options: _trunk(  # type: ignore[misc]
                    device, a, s, dtype, w, o
                ),
            )


def _trunk(
    device: torch.device,
    architecture: Architecture,
    shape: _Shape,
    dtype_name: str,
    way: str,
    options: dict[str, Any],
) -> Finding:
    dtype: torch.dtype = getattr(torch, dtype_name)
    model = randomize(architecture.build()).to(device, dtype)
    fused: Any = optimize(model, backend="triton", verify=False, **options)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    if way == "channels-last input":
        x = x.contiguous(memory_format=torch.channels_last)
    limit = LIMITS[dtype]
    if device.type == "cuda" and dtype == torch.float32:
        limit = LIMITS[torch.float16]  # TF32 keeps as many bits of an operand as float16
    with torch.no_grad():
        exact: Any = model.double()
        truth = exact.forward_features(x.double()) if way == "features" else exact(x.double())
        call = fused.forward_features if way == "features" else fused
        # The first call launches, the second captures a graph, and later ones replay it.
        error = relative_error([call(x) for _ in range(3)], [truth] * 3)
    return Finding(error, limit)
