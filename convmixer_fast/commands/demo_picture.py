"""The demo's picture: digits with both predictions, the photograph, and the times."""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from convmixer_fast.commands.demo_report import DemoReport
from convmixer_fast.models.digits import Digits
from convmixer_fast.support.optional import need
from convmixer_fast.support.timing import Timings

__all__ = ["draw"]


def draw(report: DemoReport, digits: Digits, photo: Image.Image) -> None:
    """Write the picture to ``report.output``."""
    figure = need("matplotlib.figure", "the demo", "demo").Figure(
        figsize=(11, 6.8), dpi=140, layout="constrained"
    )
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
