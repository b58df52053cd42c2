"""Timing of several callables against each other, interleaved.

One round calls every candidate once, in turn (A B C A B C ...), so that a machine
that slows down for a while is likely to slow all of them. A burst of other work can
still hit one of them alone: look at the spread (:meth:`Timings.spread`) too.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Measure", "Timings", "cuda_events", "interleave", "wall_clock"]

Measure = Callable[[Callable[[], object]], float]
"""Calls its argument once and returns the seconds that this took."""


def wall_clock(call: Callable[[], object]) -> float:
    """Measure ``call`` with the monotonic clock: for what is done when it returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_events(device: torch.device) -> Measure:
    """Return what measures a call between two events on the current stream of ``device``.

    The time is the device's, from the moment at which it is free to begin: that of the
    kernels, and of the gaps between them where Python launches too slowly.
    """

    def measure(call: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            milliseconds: float = start.elapsed_time(end)
            return milliseconds / 1e3

    return measure


@dataclass(frozen=True)
class Timings:
    """What :func:`interleave` measured."""

    seconds: Mapping[str, tuple[float, ...]]
    """By candidate: the seconds of each of its calls, in the order of the rounds."""

    @property
    def rounds(self) -> int:
        """How often each candidate was timed."""
        return len(next(iter(self.seconds.values())))

    @property
    def medians(self) -> dict[str, float]:
        """The median seconds of each candidate."""
        return {name: statistics.median(times) for name, times in self.seconds.items()}

    def quantile(self, name: str, q: float) -> float:
        """Return the seconds that a share ``q`` of the calls of ``name`` stayed within.

        Between two calls it is interpolated; ``q=0.5`` is the median.

        Raises:
            ValueError: ``q`` is not within 0 and 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be between 0 and 1, got {q}")
        times = sorted(self.seconds[name])
        position = q * (len(times) - 1)
        below = int(position)
        above = min(below + 1, len(times) - 1)
        return times[below] + (position - below) * (times[above] - times[below])

    @property
    def spread(self) -> float:
        """How much the times of one candidate vary at worst: quantile 0.8 over quantile 0.2."""
        return max(self.quantile(name, 0.8) / self.quantile(name, 0.2) for name in self.seconds)

    def ratio(self, baseline: str, candidate: str) -> float:
        """Return the median of ``baseline`` over that of ``candidate``: how much faster it is."""
        medians = self.medians
        return medians[baseline] / medians[candidate]


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int | None = None,
    budget_s: float | None = None,
    min_rounds: int = 1,
    warmup: int = 3,
    pause_s: float = 0.0,
    measure: Measure = wall_clock,
) -> Timings:
    """Time ``candidates`` round by round until a number of rounds or a time is reached.

    Args:
        candidates: what to call, by name, in the order within a round.
        rounds: the number of timed rounds, or the most of them if ``budget_s`` is given too.
        budget_s: seconds after which no further timed round begins; the warm-up is not
            counted.
        min_rounds: that many are timed even when ``budget_s`` is over.
        warmup: rounds that are run first and not timed.
        pause_s: seconds of sleep before each timed call. Libraries keep their threads
            spinning for a while after a call, in the way of the next candidate. An untimed
            call follows the sleep and wakes the candidate's own threads, unless its calls
            take so long (5 pauses) that waking is no part of their time worth speaking of.
        measure: how a call is timed, in seconds: :func:`wall_clock`, or :func:`cuda_events`.

    Raises:
        ValueError: there are no candidates, neither ``rounds`` nor ``budget_s`` is given,
            or a number is out of range.
    """
    if not candidates:
        raise ValueError("candidates must not be empty")
    if rounds is None and budget_s is None:
        raise ValueError("pass rounds or budget_s: without them the timing would not end")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if budget_s is not None and budget_s < 0:
        raise ValueError(f"budget_s must not be negative, got {budget_s}")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}")
    if pause_s < 0:
        raise ValueError(f"pause_s must not be negative, got {pause_s}")

    if min_rounds < 1 or (rounds is not None and min_rounds > rounds):
        raise ValueError(f"min_rounds must be from 1 to rounds ({rounds}), got {min_rounds}")

    for _ in range(warmup):
        for call in candidates.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    done, began = 0, time.perf_counter()
    while True:
        for name, call in candidates.items():
            if pause_s > 0:
                time.sleep(pause_s)
                if not seconds[name] or seconds[name][-1] < 5 * pause_s:
                    call()
            seconds[name].append(measure(call))
        done += 1
        over = budget_s is not None and time.perf_counter() - began >= budget_s
        if done == rounds or (over and done >= min_rounds):
            return Timings({name: tuple(times) for name, times in seconds.items()})
