"""What a call costs besides its kernels: the host's share, part by part."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from convmixer_fast.benchmarks.environment import environment
from convmixer_fast.benchmarks.gpu.models import with_input
from convmixer_fast.optimize import optimize
from convmixer_fast.runtime.sweep import medians_on

__all__ = ["main"]

_CASES = (
    ("convmixer_768_32", 1),
    ("convmixer_768_32", 64),
    ("convmixer_1536_20", 1),
    ("convmixer_1536_20", 64),
    ("convmixer_1024_20_ks9_p14", 1),
    ("convmixer_1024_20_ks9_p14", 64),
    ("cifar_256_8", 1),
    ("cifar_256_8", 1024),
)
_IN_FLIGHT = 10
"""Calls between two waits for the device: so few that its queue is never full."""


def main() -> int:
    """Measure each case, and write what was found after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.calls", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file of the results")
    parser.add_argument("--seconds", type=float, default=30.0, help="no case is begun later")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, tiny")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    found: list[dict[str, Any]] = []
    data = {"environment": environment(device).to_json(), "cases": found}
    for name, images in _CASES[: 1 if arguments.rehearse else None]:
        if time.monotonic() > deadline:
            break
        model, x = with_input(name, images, device, rehearse=arguments.rehearse)
        with torch.no_grad():
            measured = {**_kernels(model, x), **_host(model, x)}
        found.append({"model": name, "images": len(x), **measured})
        arguments.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        times = {key: seconds for key, seconds in measured.items() if key.endswith("_s")}
        shown = ", ".join(f"{key} {1e6 * seconds:.1f}" for key, seconds in times.items())
        print(f"{name}, batch {images}, us: {shown}", flush=True)
    return 0 if found else 1


def _kernels(model: Any, x: torch.Tensor) -> dict[str, float]:
    """Time the trunk alone in a CUDA graph, as the device runs it."""
    fused: Any = optimize(model, backend="triton", verify=False)
    make, x = fused._engine.bare_trunks(fused, x)
    trunk: Any = make()
    trunk(x, "logits")  # compiles
    return medians_on(x.device, {"device_s": lambda: trunk(x, "logits")}, 0.5, repeats=4)


def _host(model: Any, x: torch.Tensor) -> dict[str, float]:
    """Time what the host does for a call that replays a graph, and parts of it."""
    fused: Any = optimize(model, backend="triton", verify=False)
    for _ in range(3):
        fused(x)
    engine = fused._engine
    (made,) = engine._made.values()
    calls: dict[str, Callable[[], object]] = {
        "host_call_s": lambda: fused(x),
        "host_checks_s": lambda: engine._find(fused, x),
        "host_trunk_s": lambda: made.trunk(x, "logits"),
    }
    graphs = getattr(made.trunk, "_graphs", {})
    for captured in graphs.values():
        calls["host_replay_s"] = captured._graph.replay
        calls["host_copy_s"] = lambda captured=captured: captured._x.copy_(x)  # type: ignore[misc]
        calls["host_clone_s"] = captured._out.clone
    return {name: _host_time(call, x.device) for name, call in calls.items()}


def _host_time(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(12 if device.type == "cuda" else 2):
        began = time.perf_counter()
        for _ in range(_IN_FLIGHT):
            call()
        times.append((time.perf_counter() - began) / _IN_FLIGHT)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
