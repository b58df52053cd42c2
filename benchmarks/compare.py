"""Two runs side by side: by how much did the ratios between providers change?"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from convmixer_fast.benchmarks.results import Row, by_case
from convmixer_fast.benchmarks.tables import speedup

__all__ = ["Change", "changes", "compare_table"]


@dataclass(frozen=True)
class Change:
    """The best peer's time over ours, in one case of two runs."""

    case: str
    before: float
    after: float

    @property
    def relative(self) -> float:
        """The change as a share of the first ratio."""
        return self.after / self.before - 1


def changes(before: list[Row], after: list[Row]) -> Iterator[Change]:
    """Yield the cases that both runs have timed with this package and something else."""
    ratios = {
        (row.bench, row.case, row.dtype): speedup(providers) for row, providers in by_case(after)
    }
    for row, providers in by_case(before):
        first, second = speedup(providers), ratios.get((row.bench, row.case, row.dtype))
        if first is not None and second is not None:
            yield Change(f"{row.bench}: {row.case}, {row.dtype}", first, second)


def compare_table(found: list[Change]) -> Table:
    """Return one line a case, the largest change first."""
    table = Table("case", "ratio before", "after", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    for change in sorted(found, key=lambda change: -abs(change.relative)):
        table.add_row(
            change.case, f"{change.before:.2f}", f"{change.after:.2f}", f"{change.relative:+.1%}"
        )
    return table
