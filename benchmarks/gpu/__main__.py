"""``python -m benchmarks.gpu first``: see :mod:`convmixer_fast.benchmarks.gpu`."""

import argparse
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

from convmixer_fast.benchmarks.gpu.plan import PLANS
from convmixer_fast.benchmarks.gpu.processes import ROOT
from convmixer_fast.benchmarks.gpu.session import Session

_NEEDED = ("torch", "triton", "numpy", "safetensors", "PIL", "rich", "typer", "pytest")


def main() -> int:
    """Run a plan, or print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("plan", choices=tuple(PLANS))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>-<date>")
    parser.add_argument("--seconds", type=float, help="for everything; default: 340")
    parser.add_argument(
        "--only",
        help="steps in this order: checks,models or, with the seconds of each, checks:25,models:60",
    )
    parser.add_argument("--list", action="store_true", help="print the plan and end")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, tiny")
    arguments = parser.parse_args()
    whole_s = arguments.seconds or (1500.0 if arguments.rehearse else 340.0)
    steps = PLANS[arguments.plan]
    if arguments.only:
        by_name = {step.name: step for step in steps}
        chosen = []
        for part in arguments.only.split(","):
            name, _, seconds = part.partition(":")
            if name not in by_name:
                parser.error(f"no step is called {name!r}; there are {', '.join(by_name)}")
            step = by_name[name]
            chosen.append(replace(step, seconds=float(seconds)) if seconds else step)
        steps = tuple(chosen)
    if arguments.list:
        for step in steps:
            print(f"{step.seconds:4.0f} s  {step.name}")
        print(
            f"{sum(step.seconds for step in steps):4.0f} s at most, {whole_s:.0f} s of "
            "them are given: what comes last gets what is left"
        )
        return 0
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"this needs what this Python lacks: {', '.join(missing)}", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available() and not arguments.rehearse:
        print("this needs a CUDA device; --rehearse tries it without one", file=sys.stderr)
        return 2
    output = arguments.output or _default_output(arguments.rehearse)
    output.mkdir(parents=True, exist_ok=True)
    return Session(output.resolve(), whole_s, arguments.rehearse).run(steps)


def _default_output(rehearse: bool) -> Path:
    import torch

    from convmixer_fast.benchmarks.environment import environment

    slug = environment(torch.device("cpu" if rehearse else "cuda")).slug()
    return ROOT / "benchmarks" / "results" / (f"rehearsal-{slug}" if rehearse else slug)


if __name__ == "__main__":
    sys.exit(main())
