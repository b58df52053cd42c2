"""The row that a sweep's result adds to a kernel's table, as code."""

from typing import Any

from convmixer_fast.benchmarks.environment import Environment
from convmixer_fast.benchmarks.gpu.candidates import TILES

__all__ = ["table_row"]


def table_row(result: dict[str, Any], where: Environment) -> str:
    """Return the row for 16-bit numbers, with its reason.

    Args:
        result: of one batch: an element of ``problems`` in ``tiles.json``.
        where: it was measured.
    """
    problem, best = result["problem"], result["tiles"][0]
    present = next(row for row in result["tiles"] if row["present"])
    gain = present["seconds"] / best["seconds"]
    reason = f"# {result['batch']}: {1e6 * best['seconds']:.1f} us, {gain:.2f}x the present tile's"
    reason += f" rate, {where.device}, {where.date[:10]}."
    if problem["op"] == "depthwise_block":
        limits = f"{problem['kernel_size']}, {problem['height']}, {problem['width']}, 0, 4"
    else:
        devices = "_DATACENTER" if best["kind"] == "TmaTile" else "_EVERY"
        limits = f'{devices}, "16-bit", True, {problem["height"] * problem["width"]}, 0'
    return f"{reason}\nConfig({limits}, {TILES[best['kind']](**best['tile'])!r}),"
