"""Rows of results, and the files that keep them: JSON with everything, CSV beside it."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from convmixer_fast.benchmarks.ceilings import Ceilings
from convmixer_fast.benchmarks.environment import Environment
from convmixer_fast.support.files import write_whole

__all__ = ["ResultFile", "Row", "by_case", "read_folder", "read_results"]


@dataclass(frozen=True)
class Row:
    """What was found of one provider in one case. Times are of one call, in seconds."""

    bench: str
    """The op, or ``"model"``."""
    case: str
    """What was computed, as people say it: ``"convmixer_768_32, 224 px, batch 1"``."""
    labels: dict[str, str | int]
    """The same in parts: model, batch, image_size ..."""
    dtype: str
    provider: str
    status: str
    """``"ok"``; ``"wrong"``: it computes something else, and was not timed; ``"failed"``: it
    raised, see ``note``; ``"crashed"``: it did and broke the device; ``"skipped"``: it was not
    its turn any more."""
    note: str = ""
    error: float | None = None
    """Largest difference from the float64 reference over its largest magnitude."""
    limit: float | None = None
    """The error from which on a provider is ``"wrong"``."""
    p20_s: float | None = None
    p50_s: float | None = None
    p80_s: float | None = None
    samples: int = 0
    """How many readings of the clock the quantiles are over."""
    launch: str = ""
    """How it was called: ``"call"``, or ``"graph"`` for replays of a CUDA graph."""
    images: int = 0
    flops: float = 0.0
    """Operations of one call."""
    bytes: float = 0.0
    """Least bytes moved by one call."""
    floor_s: float | None = None
    """The roofline's time, see :meth:`Work.floor_s`."""
    peak_memory_bytes: int | None = None
    """Device memory (GPU) or resident memory (CPU) that the first call took on top of weights
    and inputs; None where it was not seen."""

    @property
    def images_per_s(self) -> float | None:
        """Throughput by the median."""
        return self.images / self.p50_s if self.p50_s else None

    @property
    def flop_per_s(self) -> float | None:
        """Arithmetic rate by the median."""
        return self.flops / self.p50_s if self.p50_s else None

    @property
    def bytes_per_s(self) -> float | None:
        """Least bytes over the median time."""
        return self.bytes / self.p50_s if self.p50_s else None

    @property
    def roofline_share(self) -> float | None:
        """The roofline's time over the median time."""
        return self.floor_s / self.p50_s if self.p50_s and self.floor_s else None

    @property
    def ours(self) -> bool:
        """Whether the provider is this package."""
        return self.provider.startswith("ours")

    @property
    def peer(self) -> bool:
        """Whether a user would pick it instead; another runtime on our export is neither."""
        return not self.provider.startswith(("ours", "export"))


_DERIVED = ("images_per_s", "flop_per_s", "bytes_per_s", "roofline_share")


@dataclass
class ResultFile:
    """The results of one benchmark in one folder, written again whenever rows are added.

    Args:
        path: of the JSON file; the CSV beside it has the same rows. None writes nothing.
        environment: of this run.
        ceilings: of this run.
        rows: found so far.
        absent: providers that cannot run here, and why.
    """

    path: Path | None
    environment: Environment
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: Path | None,
        environment: Environment,
        ceilings: Callable[[], Ceilings],
        *,
        fresh: bool = False,
    ) -> "ResultFile":
        """Begin a file, or go on with the one that is there.

        Args:
            path: of the JSON file; None for none.
            environment: of this run.
            ceilings: measures them, where the file has none yet.
            fresh: whether what is there is replaced.

        Raises:
            ValueError: the file that is there was measured under other conditions; says which.
        """
        if path is None or fresh or not path.exists():
            return cls(path, environment, ceilings())
        found = read_results(path)
        differing = found.environment.differing(environment)
        if differing:
            raise ValueError(
                f"{path} has results of another {', '.join(differing)}; choose another folder, "
                "or --fresh to replace them"
            )
        return cls(path, environment, found.ceilings, found.rows)

    def has(self, bench: str, case: str, dtype: str, providers: Iterable[str]) -> bool:
        """Whether a case was measured with all of ``providers``."""
        done = {
            row.provider
            for row in self.rows
            if (row.bench, row.case, row.dtype) == (bench, case, dtype) and row.status != "skipped"
        }
        return done >= set(providers)

    def crashed(self, bench: str, case: str, dtype: str) -> dict[str, Row]:
        """Return the rows of a case's providers that broke the device, which none tries again."""
        return {
            row.provider: row
            for row in self.rows
            if (row.bench, row.case, row.dtype) == (bench, case, dtype) and row.status == "crashed"
        }

    def add(self, rows: Iterable[Row]) -> None:
        """Add the rows of a case, in place of those that it had, and write the files."""
        rows = list(rows)
        new = {(row.bench, row.case, row.dtype) for row in rows}
        kept = [row for row in self.rows if (row.bench, row.case, row.dtype) not in new]
        self.rows = [*kept, *rows]
        self.write()

    def write(self) -> None:
        """Write JSON and CSV; a reader sees the old files or the new ones, never half of one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "environment": self.environment.to_json(),
            "ceilings": self.ceilings.to_json(),
            "absent": self.absent,
            "rows": [asdict(row) for row in self.rows],
        }
        write_whole(self.path, (json.dumps(data, indent=1) + "\n").encode())
        labels = list(dict.fromkeys(name for row in self.rows for name in row.labels))
        plain = [item.name for item in fields(Row) if item.name != "labels"]
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow([*plain, *labels, *_DERIVED])
        for row in self.rows:
            values = [getattr(row, name) for name in plain]
            values += [row.labels.get(name, "") for name in labels]
            writer.writerow([*values, *(getattr(row, name) for name in _DERIVED)])
        write_whole(self.path.with_suffix(".csv"), table.getvalue().encode())


def read_results(path: Path) -> ResultFile:
    """Read what :meth:`ResultFile.write` wrote.

    Raises:
        ValueError: the file is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return ResultFile(
            path,
            Environment(**data["environment"]),
            Ceilings(**data["ceilings"]),
            [Row(**row) for row in data["rows"]],
            data["absent"],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results file of these benchmarks: {error}") from error


def read_folder(path: Path) -> ResultFile:
    """Read a results file, or all those of a folder as one, which goes by the first one's stamp.

    Raises:
        ValueError: there is none.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no results: no .json file")
    first, *others = (read_results(file) for file in files)
    for other in others:
        first.rows += other.rows
        first.absent |= other.absent
        first.ceilings.flop_per_s.update(other.ceilings.flop_per_s)
    return first


def by_case(rows: Iterable[Row]) -> Iterator[tuple[Row, Mapping[str, Row]]]:
    """Yield each case's first row and all its rows by provider, in the order measured."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.bench, row.case, row.dtype), {})[row.provider] = row
    for providers in cases.values():
        yield next(iter(providers.values())), providers
