"""Minutes of traffic: threads, mixed shapes, bad requests between good ones; memory by the second.

``python -m tests.fuzz.load --minutes 10 --output FOLDER`` checks every answer bit by bit, and that
memory stays where it is after the first tenth; it draws the memory's curve.
"""

import json
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from convmixer_fast import optimize
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize

_SIZES = ((1, 32, 32), (3, 32, 32), (1, 17, 40), (8, 16, 16), (2, 64, 48), (1, 224, 224))
_GROWTH_MIB = 32
"""What memory may grow by after the first tenth: the allocator's pieces, not a leak by the call."""


def resident_mib() -> float:
    """Return what this process holds of the machine's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def served() -> dict[str, nn.Module]:
    """Return the modules that requests go to."""
    wide = randomize(Architecture(256, 4, 5, 2, "gelu", 3, 10).build())
    narrow = randomize(Architecture(48, 2, 9, 7, "relu", 3, 10).build())
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own_head = randomize(Architecture(64, 2, 7, 4, "silu", 3, 10).build())
    own_head.head = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return {
        "float32": optimize(wide, backend="cpu"),
        "narrow": optimize(narrow, backend="cpu"),
        "own head": optimize(own_head.eval(), backend="cpu"),
        "int8": optimize(wide, backend="cpu", precision="int8", calibration=images, progress=False),
    }


def run(minutes: float, threads: int, seed: int = 0) -> dict:
    """Serve for so long; return what was answered, what was wrong and the memory's curve."""
    modules = served()
    random_numbers = torch.Generator().manual_seed(seed)
    requests = []
    with torch.inference_mode():
        for name, module in modules.items():
            for n, h, w in _SIZES:
                x = torch.randn(n, 3, h, w, generator=random_numbers)
                requests.append((name, module, x, module(x)))
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    lock, end = threading.Lock(), time.monotonic() + 60 * minutes

    def bad(module: nn.Module) -> None:
        for x in (torch.zeros(1, 2, 32, 32), torch.zeros(1, 3, 1, 1), torch.zeros(3, 4)):
            try:
                module(x)
            except (ValueError, RuntimeError, TypeError):
                continue
            raise AssertionError(f"a request of shape {tuple(x.shape)} was answered")

    def serve(number: int) -> None:
        chance, mine = random.Random(seed + number), Counter()
        try:
            with torch.inference_mode():
                while time.monotonic() < end:
                    name, module, x, expected = chance.choice(requests)
                    if chance.random() < 0.02:
                        bad(module)
                        mine["refused"] += 3
                        continue
                    if not torch.equal(module(x), expected):
                        raise AssertionError(f"{name}, {tuple(x.shape)}: another answer")
                    mine[name] += 1
        except Exception as error:
            wrong.append(f"thread {number}: {type(error).__name__}: {error}")
        with lock:
            counts.update(mine)

    workers = [threading.Thread(target=serve, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    curve, start = [], time.monotonic()
    while any(worker.is_alive() for worker in workers):
        curve.append((round(time.monotonic() - start, 1), round(resident_mib(), 1)))
        time.sleep(min(1.0, 0.6 * minutes))
        if time.monotonic() > end + 60:
            wrong.append("a thread does not come back")
            break
    settled = [size for second, size in curve if second > 6 * minutes]
    growth = max(settled) - settled[0]
    if growth > _GROWTH_MIB:
        wrong.append(f"memory grows by {growth:.0f} MiB after the first tenth")
    return {"answers": dict(counts), "wrong": wrong, "growth_mib": growth, "curve": curve}


def draw(found: dict, path: Path) -> None:
    """Draw the memory's curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*found["curve"], strict=True), color="#0969da")
    axis.set(xlabel="seconds", ylabel="resident memory, MiB", ylim=(0, None))
    answers = sum(found["answers"].values())
    axis.set_title(f"{answers:,} requests, {found['threads']} threads", loc="left", fontsize=10)
    axis.grid(True, linewidth=0.3)
    figure.savefig(path, metadata={"Date": None})


def main(
    minutes: Annotated[float, typer.Option()] = 10.0,
    threads: Annotated[int, typer.Option()] = 8,
    output: Annotated[Path | None, typer.Option(help="Folder for load.json and load.svg.")] = None,
) -> None:
    """Serve for some minutes; exit with 1 if an answer was wrong or memory grew."""
    found = {"minutes": minutes, "threads": threads, **run(minutes, threads)}
    print(json.dumps({name: value for name, value in found.items() if name != "curve"}, indent=1))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "load.json").write_text(json.dumps(found) + "\n")
        draw(found, output / "load.svg")
    raise typer.Exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    typer.run(main)
