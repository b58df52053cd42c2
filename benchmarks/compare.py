"""Two runs side by side: by how much did the ratios between providers change?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from convmixer_fast.benchmarks.results import Row, by_case
from convmixer_fast.benchmarks.tables import speedup

__all__ = ["Change", "changes", "compare_summary", "compare_table"]

_LIMIT = 0.1


@dataclass(frozen=True)
class Change:
    """The best peer's time over ours, in one case of two runs."""

    case: str
    before: float
    """Of medians."""
    after: float
    undisturbed_before: float
    """Of the times that a fifth of the readings stayed within."""
    undisturbed_after: float

    @property
    def relative(self) -> float:
        """The change as a share of the first ratio."""
        return self.after / self.before - 1

    @property
    def undisturbed(self) -> float:
        """In the same way, where other users of the machine matter less."""
        return self.undisturbed_after / self.undisturbed_before - 1


def changes(before: list[Row], after: list[Row]) -> Iterator[Change]:
    """Yield the cases that both runs have timed with this package and something else."""
    others = {(row.bench, row.case, row.dtype): providers for row, providers in by_case(after)}
    for row, providers in by_case(before):
        other = others.get((row.bench, row.case, row.dtype), {})
        ratios = [speedup(providers), speedup(other)]
        ratios += [speedup(providers, undisturbed=True), speedup(other, undisturbed=True)]
        found = [ratio for ratio in ratios if ratio is not None]
        if len(found) == len(ratios):
            yield Change(f"{row.bench}: {row.case}, {row.dtype}", *found)


def compare_table(found: Sequence[Change]) -> Table:
    """Return one line a case, the largest change first."""
    table = Table("case", "ratio before", "after", "change", "undisturbed")
    for column in table.columns[1:]:
        column.justify = "right"
    for change in sorted(found, key=lambda change: -abs(change.relative)):
        table.add_row(
            change.case,
            f"{change.before:.2f}",
            f"{change.after:.2f}",
            f"{change.relative:+.1%}",
            f"{change.undisturbed:+.1%}",
        )
    return table


def compare_summary(found: Sequence[Change]) -> str:
    """Say how many ratios repeat, by medians and by undisturbed times."""
    lines = []
    for name, values in (
        ("medians", [abs(change.relative) for change in found]),
        ("undisturbed times", [abs(change.undisturbed) for change in found]),
    ):
        within = sum(value <= _LIMIT for value in values)
        lines.append(
            f"ratios of {name}: {within} of {len(values)} within {_LIMIT:.0%}, "
            f"largest change: {max(values):.1%}"
        )
    return "\n".join(lines)
