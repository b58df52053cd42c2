"""The command ``convmixer-fast export``: onnx, openvino, tensorrt, pt2, triton-server."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from convmixer_fast.choices import (
    ActivationName,
    CalibrationMethod,
    FloatPrecision,
    OnnxTarget,
    OpenVinoPrecision,
    Plugins,
    Precision,
    ServerDevice,
    TorchOps,
)
from convmixer_fast.models.checkpoint import is_checkpoint, read_checkpoint
from convmixer_fast.models.images import (
    find_images,
    load_image,
    parse_labels,
    read_labels,
)
from convmixer_fast.models.named_models import find_model, stem_shape
from convmixer_fast.models.preprocessing import Preprocessing, preprocessing_from_metadata
from convmixer_fast.support.option_groups import takes

if TYPE_CHECKING:
    from convmixer_fast.export.checks import ExportReport
    from convmixer_fast.export.onnx_export import OnnxReport

__all__ = ["export_app"]

export_app = typer.Typer(
    help="Write a model for other runtimes: ONNX, OpenVINO, TensorRT, torch.export, Triton server.",
    no_args_is_help=True,
)
_out = Console()
_err = Console(stderr=True)


@dataclass(frozen=True)
class Source:
    """The model that is exported, and where to."""

    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint file, hf-hub:NAME, dim/depth/kernel/patch, or a timm name."
        ),
    ]
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images; else the checkpoint's, or 224.")
    ] = None
    activation: Annotated[
        ActivationName | None, typer.Option(help="Where neither file nor name tells.")
    ] = None
    pretrained: Annotated[bool, typer.Option("--pretrained", help="timm's trained weights.")] = (
        False
    )
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="For a name without weights: to try a runtime."),
    ] = False

    def read(self, labels: Path | None = None) -> "_Model":
        """Read the model, and what is known of its images and classes."""
        from convmixer_fast.export.metadata import preprocessing_of

        if self.pretrained and self.random_weights:
            raise ValueError("--pretrained and --random-weights exclude each other")
        model, trained = find_model(self.model, self.activation, self.pretrained)
        if not trained and not self.random_weights:
            raise ValueError(
                f"{self.model} names an architecture, and an export of it would have random "
                "weights; pass a checkpoint file, --pretrained for timm's weights of a timm name, "
                "or --random-weights if that is what you want"
            )
        if not trained:
            _out.print("the weights are random", highlight=False)
        metadata = read_checkpoint(self.model).metadata if is_checkpoint(self.model) else {}
        prepare = None
        if {"mean", "std"} & set(metadata):
            prepare = preprocessing_from_metadata(metadata)
        prepare = prepare or preprocessing_of(getattr(model, "pretrained_cfg", None) or {})
        size = self.image_size or (prepare or preprocessing_from_metadata(metadata)).image_size
        names = None
        if labels is not None:
            names = read_labels(labels)
        elif "labels" in metadata:
            names = parse_labels(metadata["labels"], "the checkpoint's metadata")
        return _Model(model, size, prepare, names)


@dataclass(frozen=True)
class OpenSizes:
    """Which of the images' sizes a file leaves open."""

    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="For one image at a time.")] = (
        False
    )
    any_size: Annotated[bool, typer.Option("--any-size", help="Leave height and width open.")] = (
        False
    )

    def options(self, model: "_Model") -> dict[str, Any]:
        """Return what :func:`to_onnx` takes of sizes, images and classes."""
        return {
            "image_size": model.image_size,
            "dynamic_batch": not self.fixed_batch,
            "dynamic_size": self.any_size,
            "preprocessing": model.preprocessing,
            "labels": model.labels,
        }


@dataclass(frozen=True)
class Quantized:
    """How 8-bit numbers are chosen, and what they are compared with."""

    calibration: Annotated[
        list[Path] | None, typer.Option(help="int8: images, or folders of them.")
    ] = None
    calibration_method: Annotated[
        CalibrationMethod, typer.Option(help="int8: how ranges are chosen.")
    ] = "minmax"
    quantize_depthwise: Annotated[
        bool, typer.Option("--quantize-depthwise", help="int8: depthwise convolutions too.")
    ] = False
    validation: Annotated[
        Path | None, typer.Option(help="A folder with one of images for each class, by number.")
    ] = None

    def options(self, model: "_Model") -> dict[str, Any]:
        """Read the images; return the options of :func:`to_onnx`."""
        return {
            "calibration": None if self.calibration is None else _load(self.calibration, model),
            "calibration_method": self.calibration_method,
            "quantize_depthwise": self.quantize_depthwise,
            "validation": (
                None if self.validation is None else _load_classes(self.validation, model)
            ),
        }


class _Model(NamedTuple):
    module: nn.Module
    image_size: int
    preprocessing: Preprocessing | None
    labels: list[str] | None


@export_app.command()
@takes(Source)
@takes(OpenSizes)
@takes(Quantized)
def onnx(
    source: Source,
    sizes: OpenSizes,
    quantized: Quantized,
    precision: Annotated[Precision, typer.Option(help="Of the file.")] = "float32",
    target: Annotated[OnnxTarget, typer.Option(help="The runtime it is for.")] = "onnxruntime",
    opset: Annotated[int | None, typer.Option(help="Of ONNX; else 20, for bfloat16 22.")] = None,
    float32_io: Annotated[
        bool, typer.Option("--float32-io", help="16 bits inside, float32 outside.")
    ] = False,
    labels: Annotated[Path | None, typer.Option(help="Class names: one a line, or JSON.")] = None,
) -> None:
    """Write an ONNX file of standard operators, checked by ONNX Runtime."""
    from convmixer_fast.export import to_onnx

    model = source.read(labels)
    report = to_onnx(
        model.module,
        source.output,
        precision=precision,
        opset=opset,
        target=target,
        float32_io=float32_io,
        **sizes.options(model),
        **quantized.options(model),
    )
    _show_quantized(report)
    _show(report)


@export_app.command()
@takes(Source)
@takes(OpenSizes)
@takes(Quantized)
def openvino(
    source: Source,
    sizes: OpenSizes,
    quantized: Quantized,
    precision: Annotated[OpenVinoPrecision, typer.Option(help="Of the file.")] = "float32",
    labels: Annotated[Path | None, typer.Option(help="Class names: one a line, or JSON.")] = None,
) -> None:
    """Write OpenVINO's own files, .xml and .bin, checked by OpenVINO."""
    from convmixer_fast.export import to_openvino

    model = source.read(labels)
    report = to_openvino(
        model.module,
        source.output,
        precision=precision,
        **sizes.options(model),
        **quantized.options(model),
    )
    _show_quantized(report.onnx)
    _show(report)


@export_app.command()
@takes(Source)
@takes(OpenSizes)
def pt2(
    source: Source,
    sizes: OpenSizes,
    precision: Annotated[FloatPrecision, typer.Option(help="Of the file.")] = "float32",
    ops: Annotated[TorchOps, typer.Option(help="fused: this package's ops.")] = "plain",
    aot_inductor: Annotated[
        bool, typer.Option("--aot-inductor", help="Compile it for this machine's CPU.")
    ] = False,
) -> None:
    """Write a .pt2 file by torch.export."""
    from convmixer_fast.export import to_torch_export

    model = source.read()
    report = to_torch_export(
        model.module,
        source.output,
        image_size=model.image_size,
        precision=precision,
        dynamic_batch=not sizes.fixed_batch,
        dynamic_size=sizes.any_size,
        ops=ops,
        aot_inductor=aot_inductor,
    )
    _show(report)


@export_app.command()
@takes(Source)
def tensorrt(
    source: Source,
    precision: Annotated[
        FloatPrecision | None, typer.Option(help="Of the engine; else float16.")
    ] = None,
    min_batch: Annotated[int, typer.Option(min=1)] = 1,
    opt_batch: Annotated[int | None, typer.Option(min=1)] = None,
    max_batch: Annotated[int, typer.Option(min=1)] = 32,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Bytes that TensorRT may use.")
    ] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="Read, and written again.")] = None,
    version_compatible: Annotated[bool, typer.Option("--version-compatible")] = False,
    plugins: Annotated[Plugins, typer.Option(help="triton: our depthwise kernel.")] = "none",
    capability: Annotated[
        int | None, typer.Option(help="Of the GPU for plugins, 90 for 9.0; else this one's.")
    ] = None,
) -> None:
    """Build a TensorRT engine, on the GPU that it is for. MODEL may be an .onnx file too."""
    from convmixer_fast.export import to_tensorrt

    module: Any = Path(source.model)
    options: dict[str, Any] = {"image_size": source.image_size or 224}
    if not source.model.endswith(".onnx"):
        module, size, prepare, _ = source.read()
        options = {"image_size": size, "preprocessing": prepare}
    if precision is not None:
        options["precision"] = precision
    report = to_tensorrt(
        module,
        source.output,
        min_batch=min_batch,
        opt_batch=opt_batch,
        max_batch=max_batch,
        workspace=workspace,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        plugins=plugins,
        capability=capability,
        **options,
    )
    _out.print(f"wrote {report.path}, {report.bytes / 2**20:.1f} MiB, in {report.seconds:.0f} s")


@export_app.command("triton-server")
def triton_server(
    model: Annotated[Path, typer.Argument(help="An .onnx file, or a .plan engine.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model repository.")],
    name: Annotated[str, typer.Option(help="Of the model there.")] = "convmixer",
    version: Annotated[int, typer.Option(min=1)] = 1,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Else 64, or the engine's.")] = None,
    preferred_batches: Annotated[str, typer.Option(help="Comma-separated.")] = "",
    max_delay_us: Annotated[
        int, typer.Option(min=0, help="That a request waits for others.")
    ] = 500,
    instances: Annotated[int, typer.Option(min=1, help="Copies that run at once.")] = 1,
    device: Annotated[ServerDevice, typer.Option(help="auto: what the server has.")] = "auto",
    labels: Annotated[
        Path | None, typer.Option(help="Class names; else those in the file.")
    ] = None,
    warmup: Annotated[
        bool, typer.Option(help="Whether the server first runs batches of zeros.")
    ] = True,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server."""
    from convmixer_fast.export import to_triton_server

    sizes = preferred_batches.split(",") if preferred_batches else []
    if not all(size.strip().isdigit() for size in sizes):
        raise ValueError(f"--preferred-batches must be like 8,16, got {preferred_batches!r}")
    folder = to_triton_server(
        model,
        output,
        name=name,
        version=version,
        max_batch=max_batch,
        preferred_batches=[int(size) for size in sizes],
        max_delay_us=max_delay_us,
        instances=instances,
        device=device,
        labels=None if labels is None else read_labels(labels),
        warmup=warmup,
    )
    _out.print(f"wrote {folder}", markup=False, soft_wrap=True)


def _load(paths: list[Path], model: _Model) -> Tensor:
    """Return the images that can be read; the others are named."""
    channels, _ = stem_shape(model.module)
    prepare = replace(model.preprocessing or Preprocessing(), image_size=model.image_size)
    images = []
    files = find_images(paths)
    for path in files:
        try:
            images.append(load_image(path, prepare, channels))
        except OSError as error:
            _err.print(f"skipped {path}: {error}", markup=False, highlight=False, soft_wrap=True)
    if not images:
        raise ValueError(f"none of {len(files)} images could be read")
    return torch.stack(images)


def _load_classes(folder: Path, model: _Model) -> tuple[Tensor, Tensor]:
    """Return the images in the folders 0, 1 ... of ``folder``, and their numbers."""
    folders = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    if not folders:
        raise ValueError(f"{folder}: expected folders called 0, 1 ..., one for each class")
    images = {int(path.name): _load([path], model) for path in sorted(folders)}
    classes = [torch.full((len(batch),), number) for number, batch in images.items()]
    return torch.cat(list(images.values())), torch.cat(classes)


def _show_quantized(report: "OnnxReport") -> None:
    if report.layers:
        table = Table("layer", "weight dB", "rounding dB", "result dB")
        for name, error in report.layers.items():
            values = (error.weight_db, error.rounding_db, error.result_db)
            table.add_row(name, *(f"{value:.1f}" for value in values))
        _out.print(table)
    if report.same_as_float32 is not None:
        share = f"{report.same_as_float32:.1%}"
        _out.print(f"calibration images with the class of float32: {share}", highlight=False)
    if report.accuracy:
        shares = ", ".join(f"{name} {share:.2%}" for name, share in report.accuracy.items())
        _out.print(f"right of the validation images: {shares}", highlight=False)


def _show(report: "ExportReport") -> None:
    for check in report.checks:
        same = (
            "" if check.same_top1 != check.same_top1 else f", top-1 {check.same_top1:.0%} the same"
        )
        _out.print(
            f"{check.images} images ({check.count}): {check.error:.1e} of the largest output away "
            f"from float64{same}",
            highlight=False,
            soft_wrap=True,
        )
    size = report.path.stat().st_size / 2**20
    _out.print(f"wrote {report.path}, {size:.1f} MiB", markup=False, soft_wrap=True)
