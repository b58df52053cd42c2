"""``python -m benchmarks tune``: every tile that a kernel could have, on the published shapes.

What is printed for the fastest is the row to add to the kernel's table, with its reason.
"""

from collections.abc import Iterator
from datetime import date

from rich.table import Table

from convmixer_fast.kernels.pointwise_tma import TmaTile
from convmixer_fast.kernels.tuned import Problem
from convmixer_fast.runtime.sweep import Sweep

__all__ = ["published_problems", "sweep_row", "sweep_table", "title"]


def published_problems(dtype: str) -> Iterator[Problem]:
    """Yield the ops of the published models' layers at 224 px."""
    for channels, side, kernel_size, activation in (
        (768, 32, 7, "relu"),
        (1536, 32, 9, "gelu"),
        (1024, 16, 9, "gelu"),
    ):
        shape = channels, channels, side, side
        yield Problem("depthwise_block", *shape, kernel_size, activation, dtype)
        yield Problem("pointwise_block", *shape, 1, activation, dtype)


def title(problem: Problem, images: int) -> str:
    """Name a problem in one line."""
    kernel = f" k{problem.kernel_size}" if problem.op == "depthwise_block" else ""
    plane = f"{problem.channels_out} x {problem.height}x{problem.width}{kernel}"
    return f"{problem.op}: {plane} {problem.activation} {problem.dtype}, batch {images}"


def sweep_row(problem: Problem, images: int, found: Sweep, device: str) -> str:
    """Return the row to add for 16-bit numbers, as code, with its reason."""
    gain = found.seconds[found.present] / found.seconds[found.best]
    microseconds = 1e6 * found.seconds[found.best]
    reason = f"# {title(problem, images)}: {microseconds:.1f} us, {gain:.2f}x the present tile's"
    reason += f" rate, {device}, {date.today().isoformat()}."
    if problem.op == "depthwise_block":
        limits = f"{problem.kernel_size}, {problem.height}, {problem.width}, 0, 4"
    else:
        devices = "_DATACENTER" if isinstance(found.best, TmaTile) else "_EVERY"
        limits = f'{devices}, "16-bit", True, {problem.height * problem.width}, 0'
    return f"{reason}\nConfig({limits}, {found.best!r}),"


def sweep_table(problem: Problem, images: int, found: Sweep) -> Table:
    """Return the tiles as a table, the fastest first."""
    table = Table("tile", "us", "of the fastest's rate", title=title(problem, images))
    fastest = found.seconds[found.best]
    for tile, seconds in found.seconds.items():
        mark = " (present)" if tile == found.present else ""
        table.add_row(f"{tile}{mark}", f"{1e6 * seconds:.1f}", f"{fastest / seconds:.2f}")
    for tile, why in found.refused.items():
        table.add_row(str(tile), "-", why)
    return table
