"""Times every tile that was found right, on the published shapes, beside what a peer takes."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer_fast.benchmarks.ceilings import Ceilings, measure_ceilings
from convmixer_fast.benchmarks.environment import Environment, environment
from convmixer_fast.benchmarks.gpu.candidates import Batch, chosen_batches, tiles_for
from convmixer_fast.benchmarks.gpu.checks import right_tiles
from convmixer_fast.benchmarks.gpu.options import add_batch_options
from convmixer_fast.benchmarks.gpu.predictions import KERNELS
from convmixer_fast.benchmarks.gpu.rows import table_row
from convmixer_fast.benchmarks.work import Work, block_step
from convmixer_fast.kernels.tuned import Problem
from convmixer_fast.runtime.sweep import Trial, medians_on

__all__ = ["main", "peers", "problem_work"]

_REPEATS = 20
"""Calls that are timed together, where they are short."""


def main() -> int:
    """Time them, and write what was found after each batch; begun again, it goes on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tiles", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file of the results")
    parser.add_argument("--checks", type=Path, required=True, help="that of the checks")
    parser.add_argument("--seconds", type=float, default=60.0, help="no problem is begun later")
    parser.add_argument("--each", type=float, default=2.0, help="seconds of timing for a problem")
    add_batch_options(parser)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    right = right_tiles(arguments.checks)
    ceilings = measure_ceilings(device, [torch.float16], seconds=0.5)
    where = environment(device)
    found = known_results(arguments.output, where)
    data = {"environment": where.to_json(), "ceilings": ceilings.to_json(), "problems": found}
    known = {result["batch"] for result in found}
    for batch in chosen_batches(arguments):
        if str(batch) in known:
            continue
        if time.monotonic() > deadline:
            break
        result = _time(batch, device, right, arguments.each, ceilings)
        found.append(result)
        arguments.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        _show(result)
        print(table_row(result, where), flush=True)
    return 0 if found else 1


def known_results(path: Path, where: Environment) -> list[dict[str, Any]]:
    """Return what an interrupted sweep has found under the same conditions."""
    if not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    if where.differing(Environment(**data["environment"])):
        return []
    problems: list[dict[str, Any]] = data["problems"]
    return problems


def problem_work(problem: Problem, images: int) -> Work:
    """Return what one call must do at least."""
    x = images, problem.channels_in, problem.height, problem.width
    inner = 1 if problem.op == "depthwise_block" else problem.channels_in
    weight = problem.channels_out, inner, problem.kernel_size, problem.kernel_size
    step, _ = block_step(weight, x, getattr(torch, problem.dtype).itemsize)
    return Work((step,), images)


def peers(problem: Problem, images: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return what else computes the problem's convolution alone, and a copy of as many bytes."""
    dtype: torch.dtype = getattr(torch, problem.dtype)
    shape = images, problem.channels_in, problem.height, problem.width
    x = torch.randn(shape, device=device).to(dtype)
    out = torch.empty(images, problem.channels_out, *shape[2:], device=device, dtype=dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    depthwise = problem.op == "depthwise_block"
    size = problem.kernel_size
    inner = 1 if depthwise else problem.channels_in
    weight = torch.randn(problem.channels_out, inner, size, size, device=device).to(dtype)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    groups = problem.channels_in if depthwise else 1

    def convolution(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        return lambda: F.conv2d(x, weight, padding=size // 2, groups=groups)

    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: out.copy_(x),
        "conv2d": convolution(x, weight),
        "conv2d, channels-last": convolution(last, weight_last),
    }
    if not depthwise:
        matrix, columns = weight.flatten(1), x.flatten(2)
        result = out.flatten(2)
        calls["matmul"] = lambda: torch.matmul(matrix, columns, out=result)
        # What a 16-bit product of the same size takes where nothing is batched.
        wide = torch.randn(problem.channels_in, columns.shape[0] * columns.shape[2], device=device)
        wide = wide.to(dtype)
        calls["mm of one matrix"] = lambda: torch.mm(matrix, wide)
    return calls


def _time(
    batch: Batch,
    device: torch.device,
    right: set[str] | None,
    seconds: float,
    ceilings: Ceilings,
) -> dict[str, Any]:
    problem, images = batch
    trial = Trial(problem, images, device)
    tiles = {f"{batch}: {tile}": tile for tile in tiles_for(batch, device)}
    present = f"{batch}: {trial.present}"
    tiles[present] = trial.present
    runs: dict[str, Callable[[], object]] = {}
    for name, tile in tiles.items():
        # Those that were found right have been compiled: launching them once is enough.
        known = right is not None and name in right
        if known or ((right is None or name == present) and trial.fault(tile) is None):
            runs[name] = trial.launch(tile).run
            runs[name]()
    others = peers(problem, images, device)
    with torch.no_grad():
        for call in others.values():
            call()
        medians = medians_on(device, {**runs, **others}, seconds, _REPEATS)
    floor = problem_work(problem, images).floor_s(ceilings, problem.dtype)
    return {
        "batch": str(batch),
        "problem": problem._asdict(),
        "images": images,
        "floor_s": floor,
        "tiles": [
            {
                "kind": type(tiles[name]).__name__,
                "tile": tiles[name]._asdict(),
                "present": name == present,
                "seconds": medians[name],
                "floor_share": floor / medians[name],
            }
            for name in sorted(runs, key=medians.__getitem__)
        ],
        "peers": {name: medians[name] for name in others},
    }


def _show(result: dict[str, Any]) -> None:
    predicted = KERNELS.get(result["batch"])
    belief = f", predicted {1e6 * predicted:.1f} us" if predicted else ""
    print(f"-- {result['batch']}: floor {1e6 * result['floor_s']:.2f} us{belief}")
    for rank, row in enumerate(result["tiles"]):
        if rank < 6 or row["present"]:
            sizes = "-".join(str(value) for value in row["tile"].values())
            mark = " (present)" if row["present"] else ""
            print(
                f"{1e6 * row['seconds']:9.2f} us {row['floor_share']:5.0%} "
                f"{row['kind']} {sizes}{mark}"
            )
    for name, seconds in result["peers"].items():
        print(f"{1e6 * seconds:9.2f} us       {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
