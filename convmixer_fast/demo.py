"""The demo: a trained model and real images, before and after ``optimize``.

Classifies held-out handwritten digits with the trained model that ships with this
package, and times it and ConvMixer-768/32, checking first that nothing changed but
the speed. Needs scikit-learn, which brings the images, and matplotlib.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from convmixer_fast import backends
from convmixer_fast.checkpoint import load, read_checkpoint
from convmixer_fast.errors import ConvMixerFastError
from convmixer_fast.images import preprocessing_from_metadata
from convmixer_fast.model import ConvMixer
from convmixer_fast.optimize import optimize
from convmixer_fast.published import PUBLISHED, Preprocessing
from convmixer_fast.timing import Timings, interleave

__all__ = [
    "TOLERANCE",
    "Comparison",
    "DemoReport",
    "Digits",
    "MismatchError",
    "MissingDependencyError",
    "held_out_digits",
    "run",
    "split_digits",
    "training_digits",
]

TOLERANCE = 2e-5
"""How far the logits may differ in float32, as a share of the largest of them."""
_DIGITS = resources.files("convmixer_fast") / "data" / "digits.safetensors"


class MismatchError(ConvMixerFastError, RuntimeError):
    """The optimized model does not compute what the original does."""


class MissingDependencyError(ConvMixerFastError, ImportError):
    """A package that only the demo needs is not installed."""


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: scans of 8 x 8 pixels."""

    images: Tensor
    """(N, 1, 8, 8), float32, from 0 (paper) to 1 (ink)."""
    labels: Tensor
    """(N,), int64: the digit written."""

    def accuracy(self, logits: Tensor) -> float:
        """Return the share of the digits, from 0 to 1, that ``logits`` (N, 10) are right about."""
        return float((logits.argmax(1) == self.labels).double().mean())


@dataclass(frozen=True)
class Comparison:
    """Logits of the original and of the optimized model for the same images."""

    original: Tensor
    optimized: Tensor

    @property
    def differing(self) -> int:
        """How many images the two models classify differently."""
        return int((self.original.argmax(1) != self.optimized.argmax(1)).sum())

    @property
    def difference(self) -> float:
        """The largest difference between two logits."""
        return float((self.original - self.optimized).abs().max())

    @property
    def relative_difference(self) -> float:
        """The largest difference as a share of the largest magnitude of the original's logits."""
        return self.difference / float(self.original.abs().max())

    def check(self, what: str) -> None:
        """Raise where the two models differ.

        Raises:
            MismatchError: a prediction differs, or a logit by more than :data:`TOLERANCE`.
        """
        # Written so that a NaN does not pass.
        if self.differing or not self.relative_difference <= TOLERANCE:
            raise MismatchError(
                f"{what}: the optimized model should give the original's outputs, but "
                f"{self.differing} of {len(self.original)} predictions differ, and the logits by "
                f"up to {self.relative_difference:.1e} of the largest (allowed {TOLERANCE:.0e}); "
                "please report this with the output of convmixer_fast.backend_info()"
            )


@dataclass(frozen=True)
class DemoReport:
    """What the demo found."""

    backend: str
    """The backend that the optimized models ran on."""
    accuracies: tuple[float, float]
    """Of the original and of the optimized model on the held-out digits, from 0 to 1."""
    digits: Comparison
    photo: Comparison
    timings: dict[str, Timings]
    """By what was timed; the candidates are ``"original"`` and ``"optimized"``."""
    output: Path
    """The picture that was written."""


def split_digits(digits: Digits, held_out_share: float) -> tuple[Digits, Digits]:
    """Split ``digits`` into a first part and a held-out one with the same share of each digit."""
    selection = _need("sklearn.model_selection")
    first, held_out = selection.train_test_split(
        np.arange(len(digits.labels)),
        test_size=held_out_share,
        random_state=0,
        stratify=digits.labels.numpy(),
    )
    return (
        Digits(digits.images[first], digits.labels[first]),
        Digits(digits.images[held_out], digits.labels[held_out]),
    )


def training_digits() -> Digits:
    """Return the digits that the packaged model was trained on."""
    return split_digits(_all_digits(), held_out_share=0.25)[0]


def held_out_digits() -> Digits:
    """Return the digits that the packaged model has never seen, always the same ones."""
    return split_digits(_all_digits(), held_out_share=0.25)[1]


def _all_digits() -> Digits:
    bunch = _need("sklearn.datasets").load_digits()
    images = torch.from_numpy(bunch.images / bunch.images.max()).float()
    return Digits(images[:, None], torch.from_numpy(bunch.target).long())


def _need(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"the demo needs scikit-learn and matplotlib, and {module} cannot be imported "
            f"({error}); pip install 'convmixer-fast[demo]'"
        ) from error


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
        _need(module)
    console = console or Console()
    backend = backends.resolve("auto", torch.device("cpu"), torch.float32)
    detail = next(row.detail for row in backends.backend_info() if row.name == backend)
    console.print(f"backend [bold]{backend}[/bold]: {escape(detail)}")
    if backend == "reference":
        reason = backends.why_not("cpu", torch.device("cpu"), torch.float32)
        console.print(f"[yellow]no fast backend can run here: {escape(str(reason))}[/yellow]")

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, torch.inference_mode():
        task = progress.add_task("", total=6)

        def step(description: str) -> None:
            progress.update(task, description=description, advance=1)

        step("classifying held-out digits")
        original, preprocessing = _digits_model()
        optimized = optimize(original, backend=backend)
        digits = held_out_digits()
        images = _normalize(digits.images, preprocessing)
        on_digits = Comparison(original(images), optimized(images))
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
        photo = _photo(Preprocessing())
        pixels = torch.from_numpy(np.asarray(photo) / np.float32(255)).permute(2, 0, 1)[None]
        image = _normalize(pixels, Preprocessing())
        original = _random_large_model()
        optimized = optimize(original, backend=backend)
        on_photo = Comparison(original(image), optimized(image))
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
        _draw(report, digits, photo)
    console.print(_timing_table(timings))
    console.print(f"wrote {escape(str(output))}")
    return report


def _digits_model() -> tuple[ConvMixer, Preprocessing]:
    with resources.as_file(_DIGITS) as path:
        return load(path), preprocessing_from_metadata(read_checkpoint(path).metadata)


def _normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    return (images - mean) / std


def _random_large_model() -> ConvMixer:
    """Return ConvMixer-768/32 with random weights and BatchNorm statistics.

    Their ranges keep the signal from fading or exploding over the 32 layers: with PyTorch's
    own initialisation the logits would hardly depend on the image.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PUBLISHED["convmixer_768_32"].build()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.get_buffer("running_mean"), -0.5, 0.5)
                nn.init.uniform_(module.get_buffer("running_var"), 1, 4)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def _photo(preprocessing: Preprocessing) -> Image.Image:
    """Return the photograph resized and cropped for the model."""
    photo = Image.fromarray(_need("sklearn.datasets").load_sample_image("china.jpg"))
    side = preprocessing.image_size
    scale = round(side / preprocessing.crop_pct) / min(photo.size)
    width, height = (max(side, round(length * scale)) for length in photo.size)
    left, top = (width - side) // 2, (height - side) // 2
    return photo.resize((width, height), Image.Resampling.BICUBIC).crop(
        (left, top, left + side, top + side)
    )


def _time(original: nn.Module, optimized: nn.Module, images: Tensor, budget_s: float) -> Timings:
    return interleave(
        {"original": lambda: original(images), "optimized": lambda: optimized(images)},
        budget_s=budget_s,
        warmup=2,
        pause_s=0.02,
    )


def _describe(comparison: Comparison) -> str:
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


def _draw(report: DemoReport, digits: Digits, photo: Image.Image) -> None:
    """Write the picture: digits with both predictions, the photograph, and the times."""
    figure = _need("matplotlib.figure").Figure(figsize=(11, 6.8), dpi=140, layout="constrained")
    figure.suptitle("ConvMixer before and after convmixer_fast.optimize", fontsize=15)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    _draw_digits(upper, report, digits)
    axes = lower.subplots(1, 4)
    axes[0].imshow(photo)
    axes[0].set_axis_off()
    axes[0].set_title("the photograph timed on the right", fontsize=10)
    for axis, (name, timing) in zip(axes[1:], report.timings.items(), strict=True):
        _draw_times(axis, name, timing)
    lower.supxlabel(
        f"median times on the CPU, {torch.get_num_threads()} threads, backend {report.backend}, "
        f"PyTorch {torch.__version__}; ConvMixer-768/32 has random weights, and its logits differ "
        f"by at most {report.photo.relative_difference:.0e} of the largest",
        fontsize=8.5,
    )
    figure.savefig(report.output)


def _draw_digits(figure: Any, report: DemoReport, digits: Digits) -> None:
    original, optimized = (f"{share:.2%}" for share in report.accuracies)
    figure.suptitle(
        f"{len(digits.labels)} held-out handwritten digits: original {original} correct, optimized "
        f"{optimized}, {report.digits.differing} predictions differ",
        fontsize=11,
    )
    predictions = torch.stack((report.digits.original, report.digits.optimized)).argmax(2)
    one_of_each = [int((digits.labels == digit).nonzero()[0]) for digit in range(10)]
    # The digits that are wrong or nearly so have the largest loss.
    losses = F.cross_entropy(report.digits.original, digits.labels, reduction="none")
    rows = {"one of\neach": one_of_each, "hardest": losses.argsort()[-10:].tolist()}
    axes = figure.subplots(len(rows), 10)
    for line, (name, indices) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, labelpad=24, va="center")
        for axis, index in zip(line, indices, strict=True):
            axis.imshow(digits.images[index, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            label, both = int(digits.labels[index]), predictions[:, index].tolist()
            right = both == [label, label]
            axis.set_xlabel(
                f"original {both[0]}\noptimized {both[1]}" + ("" if right else f"\nis a {label}"),
                fontsize=9,
                color="black" if right else "firebrick",
            )


def _draw_times(axis: Any, name: str, timing: Timings) -> None:
    milliseconds = [1e3 * seconds for seconds in timing.medians.values()]
    bars = axis.bar(list(timing.medians), milliseconds, color=("0.65", "tab:blue"), width=0.6)
    axis.bar_label(
        bars, [f"{ms:.3g} ms" if ms < 100 else f"{ms:.0f} ms" for ms in milliseconds], padding=2
    )
    ratio = timing.ratio("original", "optimized")
    axis.set_title(f"{name}\noriginal / optimized = {ratio:.2f}", fontsize=10)
    axis.margins(y=0.15)
    axis.set_yticks([])
    axis.spines[["top", "left", "right"]].set_visible(False)
