"""Choose tiles and chunks for a network by measuring them, once for a device and a shape.

What was found is kept in a file of the cache folder, named by what it depends on: device, driver,
versions and shapes. Processes that tune the same wait for each other, and files are replaced whole.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from convmixer_fast import kernels
from convmixer_fast._version import __version__
from convmixer_fast.kernels.trunk import even_parts
from convmixer_fast.kernels.tuned import Problem, Tile, Tuned, TunedFor, device_name, tuned_for
from convmixer_fast.runtime.sweep import medians_on, sweep
from convmixer_fast.support.files import write_whole

__all__ = ["Tuning", "cache_folder", "chunks_to_try", "environment", "tune"]

_log = logging.getLogger("convmixer_fast")


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` found, and how."""

    what_for: TunedFor
    tuned: Tuned
    seconds: Mapping[str, float]
    """Median of a whole call: ``"table"`` as without tuning, ``"tuned"`` as chosen."""
    cached: bool
    """Whether all this comes from the cache folder."""

    @property
    def gain(self) -> float:
        """How much faster a call has become."""
        return self.seconds["table"] / self.seconds["tuned"]


def tune(
    make_trunk: Callable[..., Any],
    x: Tensor,
    *,
    width: int,
    seconds: float,
    folder: Path,
    chunk: int | None = None,
    graphs: bool = True,
    report: Callable[[str], None] = lambda what: None,
) -> Tuning:
    """Return the fastest choice for a trunk and images like ``x``.

    Args:
        make_trunk: makes the trunk, as :class:`kernels.TritonTrunk` without its tensors.
        x: (N, C, H, W), on the device to be tuned for.
        width: channels of an activation, for its size.
        seconds: of timing for each kernel and chunk; compiling takes more.
        folder: where results are kept. If it cannot be written to, that is logged.
        chunk: images at a time, where that is not to be chosen.
        graphs: whether calls will be CUDA graphs.
        report: told what is going on.

    Raises:
        RuntimeError: a kernel of the table does not run, or computes the wrong thing.
    """
    untuned = Tuned(chunk, {})
    problems = list(make_trunk().problems(x))
    activation = width * problems[0].height * problems[0].width * x.element_size()
    chunks: list[int | None] = [chunk]
    if chunk is None:
        chunks = chunks_to_try(x.shape[0], activation, l2_bytes(x.device))
    key = {
        **environment(x.device),
        "shape": list(x.shape),
        "strides": list(x.stride()),
        "problems": [list(problem) for problem in problems],
        "chunks": chunks,
        "graphs": graphs,
    }
    with _only_process(folder, key) as path:
        found = None if path is None else _read(path, key, _what_for(x))
        if found is None:
            choices = [
                Tuned(chunk, _tiles(problems, images, x.device, seconds, report))
                for chunk, images in ((c, max(even_parts(x.shape[0], c))) for c in chunks)
            ]
            report("whole network")
            medians = _whole_calls(make_trunk, [untuned, *choices], x, seconds, graphs)
            best = min(range(len(choices)), key=lambda index: medians[index + 1])
            # The tiles' own times may mislead: not worse than the table's, all together.
            chosen = choices[best] if medians[best + 1] < medians[0] else untuned
            times = {"table": medians[0], "tuned": min(medians)}
            found = Tuning(_what_for(x), chosen, times, cached=False)
            if path is not None:
                _write(path, key, found)
    return found


def chunks_to_try(images: int, activation: int, l2: int) -> list[int | None]:
    """Return numbers of images worth computing at a time; None stands for all.

    A layer reads one activation and writes the other. The cache also holds weights, and of what
    is read and written in turns an old line is as likely to be dropped as a new one: two
    activations in a third, two thirds or all of it.

    Args:
        images: the batch.
        activation: bytes of one image's.
        l2: bytes of the L2 cache; 0 where it is not known.
    """
    fitting = {l2 * share // 3 // (2 * activation) for share in (1, 2, 3)}
    return [None, *sorted(chunk for chunk in fitting if 0 < chunk < images)]


def l2_bytes(device: torch.device) -> int:
    """Return the size of a GPU's L2 cache; 0 for other devices."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def cache_folder() -> Path:
    """Return ``convmixer_fast`` in the user's cache folder, by the XDG base directories."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convmixer_fast"


def environment(device: torch.device) -> dict[str, str]:
    """Return what times depend on besides shapes."""
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "convmixer_fast": __version__,
        "kernels": _kernels(),
        "float32_products": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    }


def _kernels() -> str:
    """Return a digest of kernels and candidates: the version does not tell when they change."""
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _driver() -> str:
    # The kernel module's own words: PyTorch knows but the version of CUDA that it offers.
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return f"CUDA {torch.version.cuda}, HIP {torch.version.hip}"


def _tiles(
    problems: Sequence[Problem],
    images: int,
    device: torch.device,
    seconds: float,
    report: Callable[[str], None],
) -> dict[Problem, Tile]:
    def say(what: str) -> None:
        report(f"{images} images: {what}")

    return {problem: sweep(problem, images, device, seconds, say).best for problem in problems}


def _whole_calls(
    make_trunk: Callable[..., Any],
    choices: Sequence[Tuned],
    x: Tensor,
    seconds: float,
    graphs: bool,
) -> list[float]:
    def call(choice: Tuned) -> Callable[[], Tensor]:
        trunk = make_trunk(tuned={_what_for(x): choice.to_json()})
        return lambda: trunk(x, "mean")

    calls = {str(index): call(choice) for index, choice in enumerate(choices)}
    for run in calls.values():
        run()  # what is compiled during a capture could not be loaded
    medians = medians_on(x.device, calls, seconds, captured=graphs)
    return [medians[name] for name in calls]


def _what_for(x: Tensor) -> TunedFor:
    return tuned_for(x.device, x.dtype, tuple(x.shape))


@contextlib.contextmanager
def _only_process(folder: Path, key: Mapping[str, Any]) -> Iterator[Path | None]:
    """Yield the file for ``key`` while no other process has it; None if there can be none."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"tuned-{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        _log.warning("what is tuned is not kept: %s", error)
        yield None
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # not every network's file system can
            _log.warning("other processes may tune the same meanwhile: %s", error)
        yield path


def _read(path: Path, key: Mapping[str, Any], what_for: TunedFor) -> Tuning | None:
    try:
        data = json.loads(path.read_text())
        if data["key"] != key:
            return None
        return Tuning(what_for, Tuned.from_json(data["tuned"]), data["seconds"], cached=True)
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        _log.warning("%s is damaged and is made again: %s", path, error)
        return None


def _write(path: Path, key: Mapping[str, Any], tuning: Tuning) -> None:
    data = {"key": key, "tuned": tuning.tuned.to_json(), "seconds": tuning.seconds}
    try:
        write_whole(path, json.dumps(data, indent=1).encode())
    except OSError as error:
        _log.warning("what is tuned is not kept: %s", error)
