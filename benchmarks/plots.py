"""Pictures of results: a roofline, throughput by provider, and how cost grows; light and dark."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convmixer_fast.benchmarks.results import ResultFile, Row, by_case
from convmixer_fast.benchmarks.tables import number
from convmixer_fast.support.optional import need

__all__ = ["PICTURES", "THEMES", "draw", "save_pictures"]


@dataclass(frozen=True)
class Theme:
    """Colours that read on a page's background."""

    background: str
    text: str
    grid: str
    ours: str
    peers: Mapping[str, str]

    def color(self, provider: str) -> str:
        """Return a provider's colour, the same in every picture."""
        if provider.startswith("ours"):
            return self.ours
        family = next((name for name in self.peers if provider.startswith(name)), None)
        return self.text if family is None else self.peers[family]


_FAMILIES = ("eager", "compile", "torchscript", "onnxruntime", "openvino", "tensorrt", "replknet")

THEMES = {
    "light": Theme(
        "#ffffff", "#1f2328", "#d1d9e0", "#0969da",
        dict(zip(_FAMILIES, ("#8c959f", "#bc6c25", "#c9a227", "#2da44e", "#8250df", "#cf222e",
                             "#6e7781"), strict=True)),
    ),
    "dark": Theme(
        "#0d1117", "#f0f6fc", "#3d444d", "#58a6ff",
        dict(zip(_FAMILIES, ("#8b949e", "#e0904a", "#d9bb4c", "#3fb950", "#bc8cff", "#ff7b72",
                             "#b1bac4"), strict=True)),
    ),
}  # fmt: skip

_MARKERS = {"depthwise_block": "o", "pointwise_block": "s", "patch_embed": "^", "model": "*"}


def save_pictures(results: ResultFile, folder: Path) -> list[Path]:
    """Draw every picture that ``results`` have something for, as PNG and SVG in both themes.

    Returns:
        The files written: ``<picture>-<theme>.png`` and ``.svg``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in PICTURES:
        for theme in THEMES:
            for suffix in ("png", "svg"):
                content = draw(results, name, theme, suffix)
                if content is not None:
                    path = folder / f"{name}-{theme}.{suffix}"
                    path.write_bytes(content)
                    written.append(path)
    return written


def draw(
    results: ResultFile, picture: str, theme: str, suffix: str, *, narrow: bool = False
) -> bytes | None:
    """Return one of :data:`PICTURES` as a file's content; None where there is nothing to show.

    Args:
        results: what was measured.
        picture: a name of :data:`PICTURES`.
        theme: a name of :data:`THEMES`.
        suffix: ``"png"`` or ``"svg"``.
        narrow: whether for a phone: one chart beside none, the legend under it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    colors = THEMES[theme]
    style = {
        "axes.edgecolor": colors.text,
        "axes.facecolor": colors.background,
        "axes.labelcolor": colors.text,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": colors.text,
        "figure.facecolor": colors.background,
        "font.size": 10,
        "grid.color": colors.grid,
        "legend.edgecolor": colors.grid,
        "legend.facecolor": colors.background,
        "legend.labelcolor": colors.text,
        "svg.hashsalt": picture,
        "text.color": colors.text,
        "xtick.color": colors.text,
        "ytick.color": colors.text,
    }
    with need("matplotlib", "drawing pictures", "bench").rc_context(style):
        figure = PICTURES[picture](results, colors, narrow)
        if figure is None:
            return None
        between = "\n" if narrow else ", "
        note = f"{results.environment.device}{between}{_conditions(results)}"
        figure.supxlabel(note, fontsize=8, color=colors.text)
        content = io.BytesIO()
        figure.savefig(
            content, format=suffix, dpi=144, metadata={"Date": None} if suffix == "svg" else {}
        )
    return content.getvalue()


def _conditions(results: ResultFile) -> str:
    stamp = results.environment
    threads = "" if stamp.device_type == "cuda" else f"{stamp.threads} threads, "
    dtypes = "/".join(dict.fromkeys(row.dtype for row in results.rows))
    return f"{threads}{dtypes}, PyTorch {stamp.versions['torch']}, {stamp.date[:10]}"


def _figure(width: float, height: float) -> Any:
    return need("matplotlib.figure", "drawing pictures", "bench").Figure(
        figsize=(width, height), layout="constrained"
    )


def _throughput(results: ResultFile, theme: Theme, narrow: bool) -> Any:
    """Draw bars of images/s, a panel for each model and batch; longer is better."""
    panels = [
        (first, [row for row in providers.values() if row.p50_s])
        for first, providers in by_case(results.rows)
        if first.bench == "model" and "sweep" not in first.labels
    ]
    panels = [(first, rows) for first, rows in panels if any(row.ours for row in rows)]
    if not panels:
        return None
    columns = 1 if narrow else min(3, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len(rows) for _, rows in panels)
    figure = _figure(4.4 * columns, (0.7 + 0.27 * most) * lines + 0.4)
    figure.suptitle("images/s, longer is better")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (first, rows) in zip(axes, panels, strict=False):
        rows.sort(key=lambda row: row.images_per_s or 0.0)
        rates = [row.images_per_s or 0.0 for row in rows]
        names = [row.provider for row in rows]
        bars = axis.barh(names, rates, color=[theme.color(name) for name in names], height=0.7)
        axis.bar_label(bars, [number(rate) for rate in rates], padding=3, fontsize=8.5)
        for label, row in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row.ours else "normal")
            label.set_fontsize(8.5)
        several = len({one.dtype for one, _ in panels}) > 1
        title = f"{first.case}, {first.dtype}" if several else first.case
        axis.set_title(textwrap.fill(title, 36 if narrow else 99), fontsize=9.5, loc="left")
        axis.margins(x=0.2)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _roofline(results: ResultFile, theme: Theme, narrow: bool) -> Any:
    """Draw rate over arithmetic intensity, under what the machine can do."""
    rows = [
        row for row in results.rows if row.p50_s and row.bench in _MARKERS and _single_step(row)
    ]
    if not rows:
        return None
    figure = _figure(4.4, 5.4) if narrow else _figure(8.8, 5.4)
    axis = figure.subplots()
    ceilings = results.ceilings
    intensities = [row.flops / row.bytes for row in rows]
    left, right = min(intensities) / 2, max(intensities) * 2
    dtypes = {row.dtype for row in rows}
    for dtype, rate in ceilings.flop_per_s.items():
        if dtype not in dtypes:
            continue
        ridge = rate / ceilings.bytes_per_s
        points = [left, *([ridge] if left < ridge < right else []), right]
        roof = [min(rate, x * ceilings.bytes_per_s) / 1e9 for x in points]
        axis.plot(points, roof, color=theme.text, linewidth=1.6)
        axis.annotate(
            f"product, {dtype}: {number(rate / 1e9)} GFLOP/s", (right, rate / 1e9), xytext=(0, 4),
            textcoords="offset points", ha="right", fontsize=8.5,
        )  # fmt: skip
    bandwidth = ceilings.bytes_per_s / 1e9
    axis.annotate(
        f"copy: {number(bandwidth)} GB/s", (left, left * bandwidth),
        xytext=(26, 4), textcoords="offset points", fontsize=8.5,
    )  # fmt: skip
    shown = _shown(rows)
    for row in rows:
        if row.provider in shown:
            axis.scatter(
                row.flops / row.bytes, (row.flop_per_s or 0.0) / 1e9,
                marker=_MARKERS[row.bench], s=46, color=theme.color(row.provider),
                edgecolors=theme.background, linewidths=0.6, zorder=4 if row.ours else 3,
            )  # fmt: skip
    for provider in shown:
        axis.scatter([], [], color=theme.color(provider), label=provider, s=46)
    for bench in dict.fromkeys(row.bench for row in rows):
        axis.scatter([], [], color=theme.text, marker=_MARKERS[bench], label=bench, s=46)
    axis.set(
        xscale="log", yscale="log", xlim=(left, right),
        xlabel="operations per byte that must be moved", ylabel="GFLOP/s",
    )  # fmt: skip
    title = "how near each op comes to the machine's limits"
    axis.set_title(title, loc="left", pad=12, fontsize=10 if narrow else 12)
    axis.grid(True, which="major", linewidth=0.5)
    _legend(figure, axis, narrow)
    return figure


def _legend(figure: Any, axis: Any, narrow: bool) -> None:
    handles, names = axis.get_legend_handles_labels()
    place = "outside lower center" if narrow else "outside right center"
    figure.legend(handles, names, fontsize=8.5, loc=place, ncols=2 if narrow else 1)


def _single_step(row: Row) -> bool:
    # A model is many ops of different intensities, which no one point stands for.
    return row.bench != "model"


def _shown(rows: Sequence[Row]) -> list[str]:
    wanted = ("eager", "compile", "replknet")
    names = dict.fromkeys(row.provider for row in rows)
    return [name for name in names if name in wanted or name.startswith("ours")]


_AXES = {
    "batch": "images in a batch",
    "image_size": "image side, pixels",
    "dim": "width, channels",
    "depth": "depth, layers",
}


def _growth(results: ResultFile, theme: Theme, narrow: bool) -> Any:
    """Draw time over batch, resolution, width and depth; lower is better."""
    rows = [row for row in results.rows if row.p50_s and row.labels.get("sweep") == "growth"]
    panels = {axis: lines for axis in _AXES if (lines := _along(rows, axis))}
    if not panels:
        return None
    if narrow:
        figure = _figure(4.4, 2.8 * len(panels) + 0.9)
        title = "milliseconds an image of a small ConvMixer,\nlower is better"
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    else:
        figure = _figure(3.1 * len(panels) + 1.6, 3.5)
        title = "milliseconds an image of a small ConvMixer, lower is better"
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.suptitle(title, fontsize=11)
    for axes_of_one, (axis, lines) in zip(axes, panels.items(), strict=True):
        for provider, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            ours = provider.startswith("ours")
            axes_of_one.plot(
                x, y, marker="o", markersize=4, color=theme.color(provider), label=provider,
                linewidth=2.2 if ours else 1.4, zorder=3 if ours else 2,
            )  # fmt: skip
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes_of_one.set(xscale="log", yscale="log", xlabel=_AXES[axis])
        axes_of_one.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes_of_one.set_xticks([], minor=True)
        axes_of_one.yaxis.set_major_locator(
            need("matplotlib.ticker", "drawing pictures", "bench").LogLocator(subs=(1, 2, 5))
        )
        axes_of_one.yaxis.set_major_formatter("{x:g}")
        axes_of_one.yaxis.set_minor_formatter("")
        axes_of_one.grid(True, linewidth=0.5)
    _legend(figure, axes[0], narrow)
    return figure


def _along(rows: Sequence[Row], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Return each provider's points on one axis, the other labels being the first row's."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        others = [name for name in _AXES if name != axis]
        if row.p50_s and all(row.labels[name] == rows[0].labels[name] for name in others):
            point = (float(row.labels[axis]), 1e3 * row.p50_s / row.images)
            lines.setdefault(row.provider, []).append(point)
    return {name: points for name, points in lines.items() if len(points) > 1}


PICTURES: Mapping[str, Callable[[ResultFile, Theme, bool], Any]] = {
    "throughput": _throughput,
    "roofline": _roofline,
    "growth": _growth,
}
"""By name: what draws it, or returns None where the results have nothing for it."""
