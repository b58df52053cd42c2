"""End to end: eager PyTorch in both layouts against the optimized model, on this machine.

Candidates take turns, with a pause before each; medians and their ratio are printed. Weights
are random: the time does not depend on them. On a CUDA device the models run in float16.
"""

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from convmixer_fast import backends, optimize
from convmixer_fast.published import PUBLISHED, Architecture
from convmixer_fast.randomize import randomize
from convmixer_fast.timing import Timings, interleave
from convmixer_fast.verify import LIMITS, relative_error

MODELS = {
    **{name: (architecture, 224) for name, architecture in PUBLISHED.items()},
    "cifar_256_8": (Architecture(256, 8, 5, 2, "gelu", num_classes=10), 32),
}


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Of: " + ", ".join(MODELS))] = None,
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4",
    seconds: Annotated[float, typer.Option(help="Of timing, for each row.")] = 10.0,
) -> None:
    """Time eager PyTorch, in both memory formats, against the optimized model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    backend = backends.resolve("auto", device, dtype)
    table = Table("model", "batch", "eager", "eager NHWC", "optimized", "ratio to the best eager")
    rows = [(name, int(batch)) for name in models or MODELS for batch in batches.split(",")]
    for name, batch in track(rows, "timing", console=Console(stderr=True), transient=True):
        timings = measure(*MODELS[name], batch, device, dtype, seconds)
        best = min(timings.ratio(eager, "optimized") for eager in ("eager", "eager NHWC"))
        times = (f"{1e3 * seconds:.2f} ms" for seconds in timings.medians.values())
        table.add_row(name, str(batch), *times, f"{best:.2f}")
    console = Console()
    console.print(table)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    console.print(
        f"medians; {where}, {dtype}, backend {backend}, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}"
    )


def measure(
    architecture: Architecture,
    image_size: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> Timings:
    model = randomize(architecture.build()).to(device, dtype)
    fast = optimize(model)
    nhwc = architecture.build().to(device, dtype, memory_format=torch.channels_last)
    nhwc.load_state_dict(model.state_dict())
    x = torch.randn(batch, architecture.in_chans, image_size, image_size).to(device, dtype)
    x_nhwc = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        error = relative_error(fast(x), model(x))
        if not error <= LIMITS[dtype]:  # a NaN is not
            raise RuntimeError(f"the optimized model is wrong: its logits differ by {error:.1e}")
        return interleave(
            {
                "eager": lambda: model(x),
                "eager NHWC": lambda: nhwc(x_nhwc),
                "optimized": lambda: fast(x),
            },
            budget_s=seconds,
            pause_s=0.02,
            device=device,
        )


if __name__ == "__main__":
    typer.run(main)
