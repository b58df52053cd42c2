"""Every tile that one Triton kernel could have: checked against the reference, then timed in turns.

Needs Triton, and so is imported only where something is to be tuned.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convmixer_fast import reference
from convmixer_fast.accuracy import LIMITS, relative_error
from convmixer_fast.kernels import depthwise_block, pointwise_block
from convmixer_fast.kernels.candidates import depthwise_candidates, pointwise_candidates
from convmixer_fast.kernels.launch import Epilogue, Launch, capability, fp32_input_precision
from convmixer_fast.kernels.pointwise_tma import suits_tma
from convmixer_fast.kernels.tuned import Problem, Tile
from convmixer_fast.runtime.cuda_graphs import CAPTURING
from convmixer_fast.support.timing import cuda_events, interleave, wall_clock

__all__ = ["Sweep", "Trial", "medians_on", "sweep"]

_REPEATS = 12
"""Launches that are timed together."""
_TF32_LIMIT = 1e-2


@dataclass(frozen=True)
class Sweep:
    """What was found for a problem."""

    present: Tile
    """The tile that the table gives."""
    seconds: dict[Tile, float]
    """Median by tile, the fastest first."""
    refused: dict[Tile, str]
    """Why, by tile: it did not compile or run, or computed the wrong thing."""

    @property
    def best(self) -> Tile:
        """The fastest tile."""
        return next(iter(self.seconds))


def sweep(
    problem: Problem,
    images: int,
    device: torch.device,
    seconds: float,
    report: Callable[[str], None] = lambda what: None,
) -> Sweep:
    """Check and time every candidate of ``problem``, as :class:`Trial` has it.

    Args:
        problem: what to compute.
        images: the batch.
        device: on which; the CPU for Triton's interpreter.
        seconds: of timing, all candidates together.
        report: told what is going on.

    Raises:
        RuntimeError: the table's own tile does not run, or computes the wrong thing; or a tile
            broke the device, which this process then cannot use any more.
    """
    trial = Trial(problem, images, device)
    refused: dict[Tile, str] = {}
    runs: dict[Tile, Callable[[], object]] = {}
    for number, tile in enumerate(trial.tiles):
        report(f"{problem.op} {number + 1}/{len(trial.tiles)}: {tile}")
        fault = trial.fault(tile)
        if fault is None:
            runs[tile] = trial.launch(tile).run
        else:
            refused[tile] = fault
    if trial.present in refused:
        raise RuntimeError(
            f"{problem}: the present tile {trial.present} fails: {refused[trial.present]}"
        )
    medians = medians_on(device, {str(tile): run for tile, run in runs.items()}, seconds, _REPEATS)
    by_tile = {tile: medians[str(tile)] for tile in runs}
    fastest_first = sorted(by_tile, key=by_tile.__getitem__)
    return Sweep(trial.present, {tile: by_tile[tile] for tile in fastest_first}, refused)


class Trial:
    """A problem on random numbers, for one tile after another: is it right, and how is it run?

    A kernel reads what the one before has written: input and result stay where they are, in the
    L2 cache or not, as in a network.

    Args:
        problem: what to compute.
        images: the batch.
        device: on which; the CPU for Triton's interpreter.
    """

    tiles: list[Tile]
    """The one that the table gives, and then the candidates."""

    def __init__(self, problem: Problem, images: int, device: torch.device) -> None:
        self.problem = problem
        self._device = device
        self._launch, self.tiles, self._out, self._expected = _candidates(problem, images, device)
        dtype = self._out.dtype
        tf32 = dtype == torch.float32 and fp32_input_precision() == "tf32"
        self.limit = _TF32_LIMIT if tf32 else LIMITS[dtype]
        self.error = float("nan")
        """Of the tile that was looked at last: see :func:`accuracy.relative_error`."""

    @property
    def present(self) -> Tile:
        """The tile that the table gives."""
        return self.tiles[0]

    def launch(self, tile: Tile) -> Launch:
        """Return what computes the problem with ``tile``."""
        return self._launch(tile)

    def fault(self, tile: Tile) -> str | None:
        """Run ``tile``; return why it cannot be used: what was raised, or how wrong it was.

        Raises:
            torch.OutOfMemoryError: there is no memory for it.
            RuntimeError: it broke the device, which this process then cannot use any more.
        """
        self.error = float("nan")
        self._out.fill_(float("nan"))  # what is not written must not be the last tile's
        try:
            self.launch(tile).run()
            error = relative_error(_ends(self._out), self._expected)
            whole = not bool(self._out.isnan().any())
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # whatever the compiler or the launch says
            _check_device(self._device, self.problem, tile, failure)
            why = next(iter(str(failure).splitlines()), "")
            return f"{type(failure).__name__}: {why}"[:80]
        self.error = error if whole else float("nan")
        return None if self.error <= self.limit else f"wrong: relative error {self.error:.1e}"


def medians_on(
    device: torch.device,
    runs: Mapping[str, Callable[[], object]],
    seconds: float,
    repeats: int = 1,
    captured: bool = True,
) -> dict[str, float]:
    """Return the median seconds of one call of each of ``runs``, timed in turns.

    On a GPU graphs of ``repeats`` calls are timed, if they are to be ``captured``: launching a
    kernel may take Python longer than running it.
    """
    if device.type != "cuda":
        return interleave(runs, budget_s=seconds, warmup=1, measure=wall_clock).medians
    if not captured:
        return interleave(runs, budget_s=seconds, min_rounds=3, measure=cuda_events(device)).medians
    timings = interleave(
        {name: _captured(device, run, repeats) for name, run in runs.items()},
        budget_s=seconds,
        warmup=1,
        min_rounds=3,
        measure=cuda_events(device),
    )
    return {name: median / repeats for name, median in timings.medians.items()}


def _captured(device: torch.device, run: Callable[[], object], repeats: int) -> Callable[[], None]:
    with torch.cuda.device(device), CAPTURING:
        graph = torch.cuda.CUDAGraph()
        # A stream of this device, where kernels are launched; other threads may go on.
        stream = torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(repeats):
                run()
    return graph.replay


def _check_device(device: torch.device, problem: Problem, tile: Tile, failure: Exception) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise RuntimeError(f"{problem}: {tile} broke the device") from failure


def _candidates(
    problem: Problem, images: int, device: torch.device
) -> tuple[Callable[[Any], Launch], list[Tile], Tensor, Tensor]:
    """Return what makes a tile's launch, the tiles, the memory of its result, what belongs there.

    The first tile is the table's. What belongs there is given for the first image and the last.
    """
    generator = torch.Generator().manual_seed(0)
    dtype: torch.dtype = getattr(torch, problem.dtype)

    def random(*shape: int, fan_in: int = 1) -> Tensor:
        numbers: Tensor = torch.randn(shape, generator=generator) / fan_in**0.5
        return numbers.to(device, torch.float32 if len(shape) == 1 else dtype)

    plane = problem.height, problem.width
    # Few images are random and the rest repeat them: a batch may be large.
    few = random(min(images, 4), problem.channels_in, *plane)
    x = few.repeat(-(-images // len(few)), 1, 1, 1)[:images].contiguous()
    out = torch.empty(images, problem.channels_out, *plane, dtype=dtype, device=device)
    bias, scale, shift = (random(problem.channels_out) for _ in range(3))
    epilogue = Epilogue(bias, scale, shift, problem.activation)
    exact = bias.double(), scale.double(), shift.double()
    ends = _ends(x).double()
    if problem.op == "depthwise_block":
        size = problem.kernel_size
        weight = random(problem.channels_out, 1, size, size, fan_in=size**2)
        expected = reference.depthwise_block_ref(
            ends, weight.double(), *exact, activation=problem.activation, residual=True
        )
        tiles: list[Any] = [depthwise_block.choose_config(x, size).tile]
        tiles += depthwise_candidates(size, dtype)

        def depthwise(tile: Any) -> Launch:
            return depthwise_block.depthwise_launch(x, weight, epilogue, out, True, tile)

        return depthwise, list(dict.fromkeys(tiles)), out, expected
    weight = random(problem.channels_out, problem.channels_in, 1, 1, fan_in=problem.channels_in)
    expected = reference.pointwise_block_ref(
        ends, weight.double(), *exact, activation=problem.activation
    )
    matrix, rows = pointwise_block.as_matrix(x), pointwise_block.aligned_rows(weight.flatten(1))
    tma = suits_tma(matrix, rows) and pointwise_block.has_tma(capability(x))
    tiles = [pointwise_block.choose_tile(matrix, rows), *pointwise_candidates(dtype, tma)]

    def pointwise(tile: Any) -> Launch:
        return pointwise_block.pointwise_launch(matrix, rows, epilogue, out, tile)

    return pointwise, list(dict.fromkeys(tiles)), out, expected


def _ends(images: Tensor) -> Tensor:
    return images[:: max(1, len(images) - 1)]
