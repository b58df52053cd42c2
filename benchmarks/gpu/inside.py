"""Where a model's time goes on a GPU: each kernel's, and the gaps between them."""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from convmixer_fast.benchmarks.ceilings import Ceilings, measure_ceilings
from convmixer_fast.benchmarks.environment import environment
from convmixer_fast.benchmarks.gpu.models import with_input
from convmixer_fast.benchmarks.work import Step, model_steps
from convmixer_fast.optimize import optimize
from convmixer_fast.recognition.recognize import recognize

__all__ = ["KernelTimes", "group", "main", "read_trace"]

KernelTimes = list[tuple[str, float, float]]
"""Name, start and duration of each kernel in their order, in seconds."""

_CASES = (
    ("convmixer_768_32", 64),
    ("convmixer_1536_20", 64),
    ("convmixer_1024_20_ks9_p14", 64),
    ("convmixer_768_32", 1),
    ("cifar_256_8", 1024),
)


def main() -> int:
    """Trace each model, and write what was found after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.inside", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file of the results")
    parser.add_argument("--seconds", type=float, default=40.0, help="no model is begun later")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, tiny")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    ceilings = measure_ceilings(device, [torch.float16], seconds=0.3)
    found: list[dict[str, Any]] = []
    data = {
        "environment": environment(device).to_json(),
        "ceilings": ceilings.to_json(),
        "models": found,
    }
    for name, images in _CASES[: 1 if arguments.rehearse else None]:
        if time.monotonic() > deadline:
            break
        model, x = with_input(name, images, device, rehearse=arguments.rehearse)
        steps = model_steps(recognize(model), tuple(x.shape), 2)
        for way, graphs in (("graph", True), ("launches", False)):
            with torch.inference_mode(False), torch.no_grad():
                fused = optimize(model, backend="triton", cuda_graphs=graphs, verify=False)
                times = _traced(fused, x, device)
            result = {"model": name, "images": len(x), "way": way}
            result |= group(times, steps, ceilings)
            found.append(result)
            _show(result)
        with torch.no_grad():
            times = _traced(model, x, device)
        found.append({"model": name, "images": len(x), "way": "eager", **group(times, (), None)})
        _show(found[-1])
        arguments.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0 if found else 1


def _traced(call: Callable[[Tensor], Any], x: Tensor, device: torch.device) -> KernelTimes:
    cuda = device.type == "cuda"
    for _ in range(3):
        call(x)
    if cuda:
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        call(x)
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(path, ("kernel", "gpu_memcpy") if cuda else ("cpu_op",))


def read_trace(path: Path, categories: Iterable[str]) -> KernelTimes:
    """Return the events of some categories of a trace that PyTorch's profiler wrote."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    chosen = set(categories)
    rows = [
        (event["name"], event["ts"] * 1e-6, event["dur"] * 1e-6)
        for event in events
        if event.get("cat") in chosen and "dur" in event
    ]
    return sorted(rows, key=lambda row: row[1])


def group(times: KernelTimes, steps: Iterable[Step], ceilings: Ceilings | None) -> dict[str, Any]:
    """Sum up a call: by kernel, in gaps, and beside the floors of a model's steps.

    Args:
        times: of one call.
        steps: what the model must do, stem, layers and head; empty for a model of another form.
        ceilings: of the same run.
    """
    kernels: dict[str, list[float]] = {}
    for name, _, duration in times:
        short = re.sub(r"<.*", "", name.removeprefix("void ")).strip()[:70]
        kernels.setdefault(short, []).append(duration)
    end = max((start + duration for _, start, duration in times), default=0.0)
    span = end - times[0][1] if times else 0.0
    rows = [
        {"kernel": name, "count": len(found), "total_s": sum(found), "median_s": _median(found)}
        for name, found in sorted(kernels.items(), key=lambda item: -sum(item[1]))
    ]
    busy = sum(duration for _, _, duration in times)
    result: dict[str, Any] = {"span_s": span, "busy_s": busy, "gaps_s": span - busy}
    result["kernels"] = rows[:8]
    if ceilings is not None:
        rate, bandwidth = ceilings.flop_per_s["float16"], ceilings.bytes_per_s
        floors = [max(step.bytes / bandwidth, step.flops / rate) for step in steps]
        result["floor_s"] = sum(floors)
        # A layer is two steps: the depthwise one, and the pointwise one.
        result["depthwise_floor_s"], result["pointwise_floor_s"] = floors[1], floors[2]
    return result


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _show(result: dict[str, Any]) -> None:
    floor = result.get("floor_s")
    share = f", floor {1e3 * floor:.3f} ms" if floor else ""
    print(
        f"-- {result['model']}, batch {result['images']}, {result['way']}: span "
        f"{1e3 * result['span_s']:.3f} ms, gaps {1e3 * result['gaps_s']:.3f} ms{share}"
    )
    for row in result["kernels"][:4]:
        print(
            f"{1e6 * row['median_s']:9.2f} us x {row['count']:<3} "
            f"{row['total_s'] / max(result['busy_s'], 1e-12):5.0%} {row['kernel']}"
        )
    if floor:
        print(
            f"{1e6 * result['depthwise_floor_s']:9.2f} us floor of a depthwise step, "
            f"{1e6 * result['pointwise_floor_s']:.2f} us of a pointwise one",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
