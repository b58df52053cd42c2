"""``python -m benchmarks tune``: every tile that a kernel could have, on the published shapes.

All candidates of a shape are checked, then timed in turns; what is printed for the fastest is
the row to add to the kernel's table, with its reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import cycle
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from convmixer_fast import reference
from convmixer_fast.kernels import depthwise_block, launch, pointwise_block
from convmixer_fast.kernels.candidates import depthwise_candidates, pointwise_candidates
from convmixer_fast.kernels.pointwise_tma import TmaTile, suits_tma
from convmixer_fast.timing import cuda_events, interleave, wall_clock
from convmixer_fast.verify import LIMITS, relative_error

__all__ = ["Problem", "Sweep", "published_problems", "tune"]

_REPEATS = 12
"""Calls that are timed together, on inputs in turns, which do not stay in the L2 cache."""
_INPUTS = 3


@dataclass(frozen=True)
class Problem:
    """One op, on one shape."""

    op: str
    channels: int
    side: int
    batch: int
    activation: str = "gelu"
    kernel_size: int = 1

    def __str__(self) -> str:
        kernel = f" k{self.kernel_size}" if self.op == "depthwise_block" else ""
        plane = f"{self.channels} x {self.side}x{self.side}{kernel}"
        return f"{self.op}: {plane} {self.activation}, batch {self.batch}"


def published_problems(batch: int) -> Iterator[Problem]:
    """Yield the ops of the published models' layers."""
    for channels, side, kernel_size, activation in (
        (768, 32, 7, "relu"),
        (1536, 32, 9, "gelu"),
        (1024, 16, 9, "gelu"),
    ):
        yield Problem("depthwise_block", channels, side, batch, activation, kernel_size)
        yield Problem("pointwise_block", channels, side, batch, activation)


@dataclass(frozen=True)
class Sweep:
    """What was found for a problem."""

    problem: Problem
    device: str
    present: Any
    """The tile that the table gives now."""
    seconds: dict[Any, float]
    """Median by tile, the fastest first."""
    refused: dict[Any, str]
    """Why, by tile: it did not compile or run, or computed the wrong thing."""

    @property
    def best(self) -> Any:
        """The fastest tile."""
        return next(iter(self.seconds))

    def row(self) -> str:
        """Return the row to add, as code, with its reason."""
        gain = self.seconds[self.present] / self.seconds[self.best]
        microseconds = 1e6 * self.seconds[self.best]
        reason = f"# {self.problem}: {microseconds:.1f} us, {gain:.2f}x the present tile's rate,"
        reason += f" {self.device}, {date.today().isoformat()}."
        problem = self.problem
        if problem.op == "depthwise_block":
            limits = f"{problem.kernel_size}, {problem.side}, {problem.side}, 0, 4"
        else:
            devices = "_DATACENTER" if isinstance(self.best, TmaTile) else "_EVERY"
            limits = f'{devices}, "16-bit", True, {problem.side**2}, 0'
        return f"{reason}\nConfig({limits}, {self.best!r}),"

    def table(self) -> Table:
        """Return the tiles as a table, the fastest first."""
        table = Table("tile", "us", "of the fastest's rate", title=str(self.problem))
        fastest = self.seconds[self.best]
        for tile, seconds in self.seconds.items():
            mark = " (present)" if tile == self.present else ""
            table.add_row(f"{tile}{mark}", f"{1e6 * seconds:.1f}", f"{fastest / seconds:.2f}")
        for tile, why in self.refused.items():
            table.add_row(str(tile), "-", why)
        return table


def tune(problem: Problem, device: torch.device, dtype: torch.dtype, seconds: float) -> Sweep:
    """Check and time every candidate of ``problem``.

    Args:
        problem: what to compute, on random numbers.
        device: on which; the CPU for a rehearsal, in Triton's interpreter.
        dtype: float16 or bfloat16.
        seconds: of timing, all candidates together.
    """
    present, runs, expected = _candidates(problem, device, dtype)
    refused: dict[Any, str] = {}
    for tile in list(runs):
        try:
            error = relative_error(runs[tile](), expected)
        except Exception as failure:  # whatever the compiler or the launch says
            refused[tile] = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"[:80]
        else:
            if error > LIMITS[dtype]:
                refused[tile] = f"wrong: relative error {error:.1e}"
        if tile in refused:
            del runs[tile]
    if present not in runs:
        raise RuntimeError(f"{problem}: the present tile {present} fails: {refused[present]}")
    on_device = device.type == "cuda"
    repeats = _REPEATS if on_device else 1
    timings = interleave(
        {str(tile): _captured(run, repeats) if on_device else run for tile, run in runs.items()},
        budget_s=seconds,
        warmup=1,
        measure=cuda_events(device) if on_device else wall_clock,
    )
    medians = {tile: timings.medians[str(tile)] / repeats for tile in runs}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return Sweep(problem, name, present, dict(sorted(medians.items(), key=_second)), refused)


def _captured(run: Callable[[], Tensor], repeats: int) -> Callable[[], None]:
    """Return a graph of so many calls: launching a kernel takes Python longer than running it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    return graph.replay


def _second(item: tuple[Any, float]) -> float:
    return item[1]


def _candidates(
    problem: Problem, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[Any, Callable[[], Tensor]], Tensor]:
    """Return the table's tile, each candidate's run, and what it should compute, in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels, side, activation = problem.channels, problem.side, problem.activation
    x = random(problem.batch, channels, side, side).to(device, dtype)
    bias, scale, shift = (random(channels).to(device) for _ in range(3))
    epilogue = launch.Epilogue(bias, scale, shift, activation)
    exact = x.double(), bias.double(), scale.double(), shift.double()
    sources = cycle([x, *(x.clone() for _ in range(_INPUTS - 1))])
    out = torch.empty_like(x)
    tiles: list[Any]
    if problem.op == "depthwise_block":
        size = problem.kernel_size
        weight = (random(channels, 1, size, size) / size).to(device, dtype)
        expected = reference.depthwise_block_ref(
            exact[0], weight.double(), *exact[1:], activation=activation, residual=True
        )
        present: Any = depthwise_block.choose_config(x, size).tile
        tiles = [*depthwise_candidates(size)]

        def run(tile: Any) -> None:
            depthwise_block.depthwise_launch(next(sources), weight, epilogue, out, True, tile).run()

    else:
        weight = (random(channels, channels, 1, 1) / channels**0.5).to(device, dtype)
        expected = reference.pointwise_block_ref(
            exact[0], weight.double(), *exact[1:], activation=activation
        )
        rows, capability = weight.flatten(1), launch.capability(x)
        tma = suits_tma(x.flatten(2), rows)
        present = pointwise_block.choose_config(
            capability, "16-bit", True, tma, problem.batch, channels, side * side
        ).tile
        tiles = [*pointwise_candidates(tma and pointwise_block.has_tma(capability))]

        def run(tile: Any) -> None:
            matrix = next(sources).flatten(2)
            pointwise_block.pointwise_launch(matrix, rows, epilogue, out, tile).run()

    def call(tile: Any) -> Callable[[], Tensor]:
        def once() -> Tensor:
            run(tile)
            return out

        return once

    return present, {tile: call(tile) for tile in dict.fromkeys([present, *tiles])}, expected
