"""Results as tables for the terminal."""

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from convmixer_fast.benchmarks.results import Row, by_case

__all__ = ["best", "case_tables", "duration", "number", "speedup", "summary_table", "wide_console"]


def wide_console() -> Console:
    """Return a console on standard output; a file or a pipe gets lines that fit the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def best(rows: Mapping[str, Row], *, ours: bool) -> Row | None:
    """Return the fastest timed row that is this package's, or a peer's."""
    timed = [row for row in rows.values() if row.p50_s and (row.ours if ours else row.peer)]
    return min(timed, key=lambda row: row.p50_s or 0.0, default=None)


def speedup(rows: Mapping[str, Row], *, undisturbed: bool = False) -> float | None:
    """Return the best peer's time over ours; None where one of them is missing.

    Args:
        rows: of one case, by provider.
        undisturbed: whether the times are those that a fifth of the readings stayed within,
            and not medians: on a machine that others use too, these vary least.
    """

    def fastest(*, ours: bool) -> float | None:
        times = (
            row.p20_s if undisturbed else row.p50_s
            for row in rows.values()
            if (row.ours if ours else row.peer)
        )
        return min((time for time in times if time), default=None)

    peer, own = fastest(ours=False), fastest(ours=True)
    return None if peer is None or own is None else peer / own


def case_tables(rows: Iterable[Row]) -> Iterable[Table]:
    """Yield a table for each case, one line a provider, the fastest first."""
    for first, providers in by_case(rows):
        table = Table(
            "provider", "median", "p20 - p80", "img/s", "GB/s", "GFLOP/s", "roofline", "memory",
            "error",
            title=escape(f"{first.bench}: {first.case}, {first.dtype}"),
            title_justify="left",
        )  # fmt: skip
        for column in table.columns[1:]:
            column.justify = "right"
        ordered = sorted(providers.values(), key=lambda row: row.p50_s or float("inf"))
        for row in ordered:
            name = f"[bold]{row.provider}[/]" if row.ours else row.provider
            if row.status != "ok":
                table.add_row(
                    name, f"[red]{row.status}[/]", "", "", "", "", "", "", escape(row.note)
                )
            else:
                table.add_row(name, *_cells(row))
        yield table


def summary_table(rows: Iterable[Row]) -> Table:
    """Return one line a case: the best peer, ours, and how much faster that is."""
    table = Table("case", "dtype", "best peer", "", "ours", "", "ratio", "over eager", "roofline")
    for column in (table.columns[3], *table.columns[5:]):
        column.justify = "right"
    for first, providers in by_case(rows):
        peer, ours = best(providers, ours=False), best(providers, ours=True)
        ratio, eager = speedup(providers), providers.get("eager")
        over_eager = (
            f"{eager.p50_s / ours.p50_s:.2f}"
            if eager and ours and eager.p50_s and ours.p50_s
            else ""
        )
        table.add_row(
            escape(f"{first.bench}: {first.case}" if first.bench != "model" else first.case),
            first.dtype,
            peer.provider if peer else "",
            duration(peer.p50_s) if peer and peer.p50_s else "",
            ours.provider if ours else "",
            duration(ours.p50_s) if ours and ours.p50_s else "",
            "" if ratio is None else f"[bold]{ratio:.2f}[/]",
            over_eager,
            _percent(ours.roofline_share if ours else peer.roofline_share if peer else None),
        )
    return table


def duration(seconds: float) -> str:
    """Return ``seconds`` with a unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def number(value: float | None) -> str:
    """Return ``value`` with three digits or more, without an exponent; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cells(row: Row) -> list[str]:
    return [
        duration(row.p50_s or 0.0),
        f"{duration(row.p20_s or 0.0)} - {duration(row.p80_s or 0.0)}",
        number(row.images_per_s),
        number((row.bytes_per_s or 0.0) / 1e9),
        number((row.flop_per_s or 0.0) / 1e9),
        _percent(row.roofline_share),
        "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:,.0f} MiB",
        f"{row.error:.0e}",
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
