"""The command ``convmixer-fast``: info, demo, verify, bench, predict, export."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from convmixer_fast._version import __version__
from convmixer_fast.benchmarks.options import Batches, Measured, batch_sizes
from convmixer_fast.choices import (
    DTYPES,
    ActivationName,
    BackendName,
    FloatPrecision,
    PredictionFormat,
    listed,
)
from convmixer_fast.commands.export_commands import export_app
from convmixer_fast.commands.predict import predict_files
from convmixer_fast.commands.prediction_output import PredictionWriter, printable
from convmixer_fast.errors import ConvMixerFastError
from convmixer_fast.models.checkpoint import build, is_checkpoint, read_checkpoint
from convmixer_fast.models.images import (
    find_images,
    parse_labels,
    read_labels,
)
from convmixer_fast.models.named_models import find_model, stem_shape
from convmixer_fast.models.preprocessing import Preprocessing, preprocessing_from_metadata
from convmixer_fast.optimize import optimize
from convmixer_fast.runtime import backends
from convmixer_fast.support.option_groups import completed, takes
from convmixer_fast.support.optional import need
from convmixer_fast.support.progress import bars
from convmixer_fast.verify import passed, verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="convmixer-fast",
    help="Fast ConvMixer inference: the same model, the same outputs, fused kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(export_app, name="export")
_out = Console()
_err = Console(stderr=True)

Backend = Annotated[
    BackendName,
    typer.Option(help="'convmixer-fast info' says which are live."),
]
Activation = Annotated[
    ActivationName | None, typer.Option(help="Where neither file nor name tells.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="timm's trained weights.")]


def main() -> None:
    """Run the command line; expected errors end in one line and exit code 2, not a traceback."""
    try:
        app()
    except (ConvMixerFastError, ValueError, TypeError, OSError) as error:
        kind = type(error).__name__
        _err.print(
            f"[bold red]error:[/] {kind}: {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"convmixer_fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what is decided.")] = False,
) -> None:
    # Not the root logger: what other libraries log is theirs.
    logger = logging.getLogger("convmixer_fast")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.handlers = [RichHandler(console=_err, show_time=False, show_path=False)]


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which backends can run here, and why the others cannot."""
    rows = backends.backend_info()
    if as_json:
        versions = {"convmixer_fast": __version__, "torch": torch.__version__}
        print(json.dumps({**versions, "backends": [asdict(row) for row in rows]}, indent=2))
        return
    _out.print(f"convmixer_fast {__version__}, torch {torch.__version__}", highlight=False)
    table = Table("backend", "live", "detail")
    for row in rows:
        table.add_row(row.name, "[green]yes[/]" if row.live else "[red]no[/]", escape(row.detail))
    _out.print(table)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the picture goes (PNG).")
    ] = Path("convmixer_fast_demo.png"),
) -> None:
    """Classify real handwritten digits with the original and the optimized model, and time both."""
    from convmixer_fast.commands import demo as demonstration

    demonstration.run(output)


@app.command("verify")
def verify_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A timm name (convmixer_768_32), a checkpoint file, hf-hub:NAME, or "
            "dim/depth/kernel/patch."
        ),
    ],
    backend: Backend = "auto",
    activation: Activation = None,
    dtypes: Annotated[
        str,
        typer.Option(
            "--dtypes",
            "--dtype",
            help="Comma-separated: float32, float16, bfloat16.",
            autocompletion=completed(FloatPrecision),
        ),
    ] = ",".join(DTYPES),
    sizes: Annotated[
        str | None, typer.Option(help="Comma-separated HxW in pixels; by default three odd ones.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 2,
    pretrained: Pretrained = False,
) -> None:
    """Compare a model's optimized form with its float64 original, at several sizes and dtypes."""
    source, trained = find_model(model, activation, pretrained)
    source.to(_device(backend))
    chosen = [DTYPES[name] for name in listed("dtypes", dtypes, FloatPrecision)]
    channels, patch = stem_shape(source)
    hw = (
        _sizes(sizes) if sizes else [(4 * patch, 4 * patch), (5 * patch + 1, 3 * patch), (224, 224)]
    )
    shapes = [(batch, channels, *size) for size in hw]
    for height, width in hw:
        if min(height, width) < patch:
            raise ValueError(f"a size of {height}x{width} is smaller than a patch of {patch}")
    _out.print(f"{escape(model)}: {'trained' if trained else 'random'} weights, backend {backend}")
    rows = []
    with _progress() as progress:
        task = progress.add_task("comparing with float64", total=len(chosen) * len(shapes))
        for row in verify(source, shapes, chosen, backend):
            rows.append(row)
            progress.advance(task)
    verdicts = {dtype: passed([row for row in rows if row.dtype == dtype]) for dtype in chosen}
    table = Table("dtype", "images", "original's error", "optimized's error", "result")
    for row in rows:
        table.add_row(
            str(row.dtype).removeprefix("torch."),
            "x".join(map(str, row.shape)),
            f"{row.original_error:.1e}",
            f"{row.optimized_error:.1e}",
            "[green]pass[/]" if verdicts[row.dtype] else "[bold red]FAIL[/]",
        )
    _out.print(table)
    _out.print(
        "Errors: largest difference from the float64 original over its largest output. A dtype "
        "passes if the optimized model's worst is at most twice the original's worst, or a few "
        "units in the last place, and within the dtype's limit."
    )
    if not all(verdicts.values()):
        raise typer.Exit(1)


@app.command()
@takes(Measured)
def bench(
    measured: Measured,
    model: Annotated[
        str,
        typer.Argument(
            help="A timm name (convmixer_768_32), a checkpoint file, hf-hub:NAME, or "
            "dim/depth/kernel/patch."
        ),
    ] = "convmixer_768_32",
    batches: Batches = "1",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels; by default the checkpoint's, or 224.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML page with pictures and tables.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the numbers as JSON and CSV.")
    ] = None,
    activation: Activation = None,
    pretrained: Pretrained = False,
) -> None:
    """Time a model with every runtime installed: PyTorch, ONNX Runtime, OpenVINO, ours ...

    Every runtime's outputs are compared with float64 first; one that is wrong is named and not
    timed. They take turns, so that a machine that slows down slows all of them.
    """
    # Imported here: nothing else needs any of it.
    from convmixer_fast.benchmarks.harness import Settings
    from convmixer_fast.benchmarks.model_cases import convmixer_case
    from convmixer_fast.benchmarks.report import write_report
    from convmixer_fast.benchmarks.runs import Run

    if report is not None:
        need("matplotlib.figure", "bench --report", "bench")  # before minutes of measuring
    source, _ = find_model(model, activation, pretrained)
    if image_size is None:
        metadata = read_checkpoint(model).metadata if is_checkpoint(model) else {}
        image_size = preprocessing_from_metadata(metadata).image_size
    name, channels = Path(model).name if Path(model).is_file() else model, stem_shape(source)[0]
    cases = [
        replace(
            convmixer_case(
                name,
                lambda: source,
                (size, channels, image_size, image_size),
                DTYPES.get(precision, torch.float32),
            ),
            int8=precision == "int8",
        )
        for precision in measured.precisions()
        for size in batch_sizes(batches)
    ]
    run = Run(measured.where, output, Settings(measured.seconds), fresh=True)
    results = run.execute("bench", cases, measured.providers)
    if report is not None:
        write_report(results, report, f"{name} on {results.environment.device}")
        _out.print(f"wrote {report}", markup=False, soft_wrap=True)
    if not any(row.ours and row.status == "ok" for row in results.rows):
        raise typer.Exit(1)


@app.command()
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(help="Image files, directories of them; - for a list on standard input."),
    ],
    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint", "-c", help="Trained weights: .safetensors, .pth, or hf-hub:NAME."
        ),
    ],
    labels: Annotated[Path | None, typer.Option(help="Class names: one a line, or JSON.")] = None,
    activation: Activation = None,
    backend: Backend = "auto",
    top: Annotated[int, typer.Option(min=1, help="Classes shown for each image.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 16,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the crop.")] = None,
    crop_pct: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Crop over resized shorter side.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Comma-separated, of pixels in [0, 1].")] = None,
    std: Annotated[str | None, typer.Option(help="Comma-separated, of pixels in [0, 1].")] = None,
    form: Annotated[
        PredictionFormat,
        typer.Option("--format", help="json: an object a line; csv: a row for each class shown."),
    ] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="As --format json.")] = False,
) -> None:
    """Classify images with a trained ConvMixer.

    Preprocessing is timm's: resize the shorter side, crop the centre, normalise; from the
    checkpoint's metadata where it states it, otherwise ImageNet's. Pictures are turned upright, by
    EXIF, first. An image that cannot be read is reported and skipped, and the exit code is then 1.
    """
    contents = read_checkpoint(checkpoint)
    model = build(contents, checkpoint, activation=activation).to(_device(backend))
    if model.num_classes == 0:
        raise ValueError(f"{checkpoint}: the model has no classifier")
    fast = optimize(model, backend=backend)
    prepare = _override(
        preprocessing_from_metadata(contents.metadata),
        image_size=image_size,
        crop_pct=crop_pct,
        mean=_floats("--mean", mean),
        std=_floats("--std", std),
    )
    names = _labels(labels, contents.metadata, fast.num_classes)
    files = find_images(images, sys.stdin)
    writer = PredictionWriter("json" if as_json else form, names, top)
    bad, start = 0, time.perf_counter()
    with _progress() as progress:
        task = progress.add_task("classifying", total=len(files))
        for path, result in predict_files(fast, files, prepare, batch):
            if isinstance(result, OSError):
                bad += 1
                _err.print(
                    printable(f"skipped {path}: {result}"),
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            else:
                writer.write(path, result)
            progress.advance(task)
    seconds = time.perf_counter() - start
    if len(files) > 1:
        rate = (len(files) - bad) / seconds
        _err.print(f"{len(files) - bad} images, {rate:.4g} images/s", highlight=False)
    if bad:
        _err.print(f"{bad} of {len(files)} images could not be read")
        raise typer.Exit(1)


def _progress() -> Progress:
    # Where both go to one terminal, results take the bar's place.
    shown = _err.is_terminal and not sys.stdout.isatty()
    return bars(_err, shown=shown)


def _device(backend: str) -> torch.device:
    """Return where models run: on the GPU if there is one, unless the CPU backend is asked for."""
    return torch.device("cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu")


def _labels(path: Path | None, metadata: Mapping[str, str], classes: int) -> list[str] | None:
    if path is not None:
        names = read_labels(path)
    elif "labels" in metadata:
        names = parse_labels(metadata["labels"], "the checkpoint's metadata")
    else:
        return None
    if len(names) != classes:
        raise ValueError(f"expected {classes} labels, one for each class, got {len(names)}")
    return names


def _sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for part in text.split(","):
        height, _, width = part.partition("x")
        if not (height.isdigit() and width.isdigit()):
            raise ValueError(f"sizes must be like 224x224,56x70, got {text!r}")
        sizes.append((int(height), int(width)))
    return sizes


def _override(prepare: Preprocessing, **given: Any) -> Preprocessing:
    return replace(prepare, **{name: v for name, v in given.items() if v is not None})


def _floats(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} must be numbers like 0.5,0.5,0.5, got {text!r}") from error
