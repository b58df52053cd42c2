"""The demo: a trained model and real images, before and after ``optimize``.

Classifies held-out handwritten digits with the trained model that ships with this
package, and times it and ConvMixer-768/32, checking first that nothing changed but
the speed. Needs scikit-learn, which brings the images, and matplotlib.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from convmixer_fast.commands.demo_picture import draw
from convmixer_fast.commands.demo_report import TOLERANCE, DemoReport, LogitsComparison
from convmixer_fast.models.convmixer import ConvMixer
from convmixer_fast.models.digits import digits_model, held_out_digits
from convmixer_fast.models.images import crop, to_input
from convmixer_fast.models.preprocessing import Preprocessing
from convmixer_fast.models.published import PUBLISHED
from convmixer_fast.models.randomize import randomize
from convmixer_fast.optimize import optimize
from convmixer_fast.runtime import backends
from convmixer_fast.support.optional import need
from convmixer_fast.support.progress import bars
from convmixer_fast.support.timing import Timings, interleave

__all__ = ["run"]


def run(
    output: Path = Path("convmixer_fast_demo.png"),
    *,
    budget_s: float = 8.0,
    console: Console | None = None,
) -> DemoReport:
    """Run the demo on the CPU: print what it finds and draw it.

    Args:
        output: the PNG to write; its folder is made where there is none.
        budget_s: seconds of timing for each of the three comparisons, warm-up apart.
        console: where to print; None prints to the terminal.

    Returns:
        What was found.

    Raises:
        MissingDependencyError: scikit-learn or matplotlib is not installed.
        MismatchError: the optimized model does not compute what the original does.
    """
    for module in ("sklearn.datasets", "matplotlib.figure"):
        need(module, "the demo", "demo")
    console = console or Console()
    backend = backends.resolve("auto", torch.device("cpu"), torch.float32)
    detail = next(row.detail for row in backends.backend_info() if row.name == backend)
    console.print(f"backend [bold]{backend}[/bold]: {escape(detail)}")
    if backend == "reference":
        reason = backends.why_not("cpu", torch.device("cpu"), torch.float32)
        console.print(f"[yellow]no fast backend can run here: {escape(str(reason))}[/yellow]")

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with bars(console, *columns) as progress, torch.inference_mode():
        task = progress.add_task("", total=6)

        def step(description: str) -> None:
            progress.update(task, description=description, advance=1)

        step("classifying held-out digits")
        original, preprocessing = digits_model()
        optimized = optimize(original, backend=backend)
        digits = held_out_digits()
        images = (digits.images - preprocessing.mean[0]) / preprocessing.std[0]
        on_digits = LogitsComparison(original(images), optimized(images))
        accuracies = digits.accuracy(on_digits.original), digits.accuracy(on_digits.optimized)
        console.print(
            f"{len(digits.labels)} held-out digits: accuracy [bold]{accuracies[0]:.2%}[/bold] "
            f"original, [bold]{accuracies[1]:.2%}[/bold] optimized; {on_digits.differing} "
            f"predictions differ; largest logit difference {_describe(on_digits)}"
        )
        on_digits.check("held-out digits")

        timings = {}
        for batch in (1, 64):
            step(f"timing the digits model, batch {batch}")
            timing = _time(original, optimized, images[:batch], budget_s)
            timings[f"digits model, batch {batch}"] = timing

        step("making ConvMixer-768/32 with random weights")
        scene = need("sklearn.datasets", "the demo", "demo").load_sample_image("china.jpg")
        photo = crop(Image.fromarray(scene), Preprocessing())
        image = to_input(photo, Preprocessing())[None]
        original = _random_large_model()
        optimized = optimize(original, backend=backend)
        on_photo = LogitsComparison(original(image), optimized(image))
        console.print(
            "ConvMixer-768/32 on a photograph (random weights: no trained ones ship with this "
            f"package): largest logit difference {_describe(on_photo)}"
        )
        on_photo.check("ConvMixer-768/32 on a photograph")
        step("timing ConvMixer-768/32, batch 1")
        timings["ConvMixer-768/32, batch 1"] = _time(original, optimized, image, budget_s)

        step("drawing")
        report = DemoReport(backend, accuracies, on_digits, on_photo, timings, output)
        output.parent.mkdir(parents=True, exist_ok=True)
        draw(report, digits, photo)
    console.print(_timing_table(timings))
    if any(timing.spread > 1.5 for timing in timings.values()):
        console.print(
            "[yellow]The times vary by more than half: the machine is doing other work too, and "
            "these ratios mean little. Run the demo again when it is idle.[/yellow]"
        )
    console.print(f"wrote {escape(str(output))}")
    return report


def _random_large_model() -> ConvMixer:
    model = PUBLISHED["convmixer_768_32"].build()
    randomize(model)
    return model


def _time(original: nn.Module, optimized: nn.Module, images: Tensor, budget_s: float) -> Timings:
    return interleave(
        {"original": lambda: original(images), "optimized": lambda: optimized(images)},
        budget_s=budget_s,
        warmup=2,
        pause_s=0.02,
    )


def _describe(comparison: LogitsComparison) -> str:
    return (
        f"{comparison.difference:.1e}, {comparison.relative_difference:.1e} of the largest logit "
        f"(allowed {TOLERANCE:.0e})"
    )


def _timing_table(timings: Mapping[str, Timings]) -> Table:
    table = Table(
        "model",
        "original",
        "optimized",
        "ratio",
        "rounds",
        title="median times, ratio original / optimized",
    )
    for name, timing in timings.items():
        original, optimized = (f"{1e3 * t:.2f} ms" for t in timing.medians.values())
        ratio = f"{timing.ratio('original', 'optimized'):.2f}"
        table.add_row(name, original, optimized, ratio, str(timing.rounds))
    for column in table.columns[1:]:
        column.justify = "right"
    return table
