"""The one harness: check every candidate, then time them in turns.

A case's candidates are built, and the output of each is compared with the float64 truth before
any is timed; what is wrong is named and not timed. The others take turns (A B C A B C ...), each
with inputs of its own memory format, of which there are so many that no cache holds them all.
"""

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.progress import Progress
from torch import Tensor

from convmixer_fast.accuracy import LIMITS, relative_error
from convmixer_fast.benchmarks.memory import cache_bytes, peak_memory
from convmixer_fast.benchmarks.providers import Provider
from convmixer_fast.benchmarks.results import ResultFile, Row
from convmixer_fast.benchmarks.subjects import Case, Subject
from convmixer_fast.export.checks import LIMITS as EXPORT_LIMITS
from convmixer_fast.support.timing import Measure, cuda_events, interleave, wall_clock

__all__ = ["DeviceLostError", "Settings", "run_cases"]

INT8_LIMIT = EXPORT_LIMITS["int8"]
_SHORTEST_READING_S = 2e-3
_MOST_INPUTS = 16


class DeviceLostError(RuntimeError):
    """A candidate broke the CUDA context: nothing more can run in this process.

    The results have that candidate as ``"crashed"`` and the case's others as ``"skipped"``;
    the same run, begun again, goes on with these.
    """


@dataclass(frozen=True)
class Settings:
    """How long and how cases are timed."""

    seconds: float = 8.0
    """Of timing for each case, all candidates together, building and checking apart."""
    min_rounds: int = 5
    """Rounds that are timed even when that takes longer."""
    pause_s: float = 0.05
    """Before each reading on a CPU: see :func:`timing.interleave`."""
    deadline: float | None = None
    """Of ``time.monotonic()``: no case is begun, and nothing slow built, after it."""

    def time_is_up(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass
class _Ready:
    """A candidate that was built and found right."""

    call: Callable[[], object]
    """Runs :attr:`calls` calls, one after the other."""
    calls: int
    launch: str


def run_cases(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    device: torch.device,
    results: ResultFile,
    settings: Settings,
    progress: Progress,
) -> None:
    """Measure ``cases`` in their order, adding each one's rows to ``results`` when it is done.

    Cases that ``results`` has already are left out, and so are those whose turn has not come
    at the deadline. What one candidate raises ends that candidate and nothing else.

    Raises:
        DeviceLostError: a candidate took the device with it; what was found is in ``results``.
    """
    task = progress.add_task("", total=len(cases))
    for case in cases:
        progress.update(task, description=f"{case.bench}: {case.name}")
        wanted = [provider for provider in providers if provider.runs(case, device)]
        done = results.has(case.bench, case.name, case.precision, [p.name for p in wanted])
        if not done and not settings.time_is_up():
            crashed = results.crashed(case.bench, case.name, case.precision)
            left = [provider for provider in wanted if provider.name not in crashed]
            try:
                rows = _run_case(case, left, device, results, settings)
            except Exception as problem:  # making the case, its truth, or while timing
                status = "failed" if _device_is_alive(device) else "crashed"
                rows = [_bare_row(case, p.name, status, _brief(problem)) for p in left]
            results.add([*rows, *crashed.values()])
            culprits = [row.provider for row in rows if row.status == "crashed"]
            if culprits:
                raise DeviceLostError(f"{culprits[0]} broke the device in {case.bench} {case.name}")
        progress.advance(task)
    progress.update(task, description="done")


def _run_case(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    results: ResultFile,
    settings: Settings,
) -> list[Row]:
    with torch.inference_mode():
        subject = case.make(device)
        try:
            return list(_rows(case, subject, providers, results, settings))
        finally:
            subject.close()
            del subject
            gc.collect()
            if _device_is_alive(device):
                torch._dynamo.reset()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _bare_row(case: Case, provider: str, status: str, note: str) -> Row:
    labels = dict(case.labels)
    return Row(case.bench, case.name, labels, case.precision, provider, status, note)


def _rows(
    case: Case,
    subject: Subject,
    providers: Sequence[Provider],
    results: ResultFile,
    settings: Settings,
) -> Iterator[Row]:
    dtype = case.precision
    inputs = [subject.input(seed) for seed in range(_how_many_inputs(subject))]
    truth = subject.truth(inputs[0])
    limit = INT8_LIMIT if case.int8 else LIMITS[case.dtype]
    if subject.device.type == "cuda" and results.environment.tf32 and dtype == "float32":
        limit = LIMITS[torch.float16]  # TF32 keeps as many bits of an operand as float16
    rows: dict[str, Row] = {}
    ready: dict[str, _Ready] = {}
    lost = False
    for provider in providers:
        found: dict[str, object] = {}
        if lost:
            found = {"status": "skipped", "note": "the device was lost before its turn"}
        elif settings.time_is_up() and ready:
            found = {"status": "skipped", "note": "there was no time left to build it"}
        else:
            try:
                formatted = _formatted(inputs, provider)
                call = provider.build(subject, formatted[0])
                if subject.device.type == "cuda":
                    call(
                        formatted[0]
                    )  # what a first call searches and compiles is no working memory
                out, peak = peak_memory(subject.device, call, formatted[0])
                error = relative_error(out, truth)
                found = {"error": error, "limit": limit, "peak_memory_bytes": peak}
                if not error <= limit:  # a NaN is not
                    found |= {"status": "wrong", "note": f"its error is {error:.1e}"}
                else:
                    ready[provider.name] = _prepare(provider, call, formatted, case.bench)
            except Exception as problem:
                alive = _device_is_alive(subject.device)
                found = {"status": "failed" if alive else "crashed", "note": _brief(problem)}
                lost = not alive
        rows[provider.name] = Row(
            bench=case.bench,
            case=case.name,
            labels=dict(case.labels),
            dtype=dtype,
            provider=provider.name,
            images=subject.work.images,
            flops=subject.work.flops,
            bytes=subject.work.bytes,
            floor_s=subject.work.floor_s(results.ceilings, dtype),
            **({"status": "ok"} | found),  # type: ignore[arg-type]
        )
    if lost:
        skipped = {"status": "skipped", "note": "the device was lost before it was timed"}
        yield from (
            replace(row, **skipped) if row.status == "ok" else row  # type: ignore[arg-type]
            for row in rows.values()
        )
        return
    yield from _timed(rows, ready, settings.seconds * case.seconds_share, settings, subject.device)


def _timed(
    rows: dict[str, Row],
    ready: dict[str, _Ready],
    seconds: float,
    settings: Settings,
    device: torch.device,
) -> Iterator[Row]:
    if not ready:
        yield from rows.values()
        return
    timings = interleave(
        {name: candidate.call for name, candidate in ready.items()},
        budget_s=seconds,
        min_rounds=settings.min_rounds,
        warmup=1,
        pause_s=settings.pause_s if device.type == "cpu" else 0.0,
        measure=_measure(device),
    )
    for name, row in rows.items():
        if name not in ready:
            yield row
            continue
        calls = ready[name].calls
        p20, p50, p80 = (timings.quantile(name, q) / calls for q in (0.2, 0.5, 0.8))
        yield replace(
            row,
            p20_s=p20,
            p50_s=p50,
            p80_s=p80,
            samples=timings.rounds,
            launch=ready[name].launch,
        )


def _device_is_alive(device: torch.device) -> bool:
    """Whether the CUDA context still works: an illegal access breaks it for good."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _measure(device: torch.device) -> Measure:
    return cuda_events(device) if device.type == "cuda" else wall_clock


def _how_many_inputs(subject: Subject) -> int:
    """So many that all that they bring through the cache is more than it holds."""
    return min(_MOST_INPUTS, 2 + int(cache_bytes(subject.device) // subject.work.bytes))


def _formatted(inputs: list[Tensor], provider: Provider) -> list[Tensor]:
    if not provider.channels_last:
        return inputs
    return [x.contiguous(memory_format=torch.channels_last) for x in inputs]


def _prepare(
    provider: Provider, call: Callable[[Tensor], Tensor], inputs: list[Tensor], bench: str
) -> _Ready:
    device = inputs[0].device
    call(inputs[-1])
    if device.type == "cuda" and (provider.capture or (provider.graph and bench != "model")):
        return _captured(call, inputs)
    seconds = _measure(device)(lambda: call(inputs[0]))
    if seconds < 0.05:
        seconds = min(_measure(device)(lambda: call(inputs[0])) for _ in range(3))
    calls = max(1, round(_SHORTEST_READING_S / max(seconds, 1e-6)))
    if calls > 1:  # every input equally often
        calls = -(-calls // len(inputs)) * len(inputs)
    turn = 0

    def run() -> None:
        nonlocal turn
        for _ in range(calls):
            call(inputs[turn % len(inputs)])
            turn += 1

    return _Ready(run, calls, "call")


def _captured(call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> _Ready:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    torch.cuda.synchronize()
    graph.replay()
    return _Ready(graph.replay, len(inputs), "graph")


def _brief(problem: Exception) -> str:
    last = traceback.extract_tb(problem.__traceback__)[-1]
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:300]} ({last.name}, line {last.lineno})"
