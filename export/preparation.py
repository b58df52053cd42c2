"""From a model to a plain module that an exporter can trace, and what the tracing needs to know."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from convmixer_fast.errors import UnsupportedModelError
from convmixer_fast.export.forms import Form
from convmixer_fast.export.plain import PlainConvMixer
from convmixer_fast.folding import fold
from convmixer_fast.models.outputs import named_tensors
from convmixer_fast.recognition.recognize import recognize
from convmixer_fast.recognition.tracing import TRACING, unwrap
from convmixer_fast.runtime.fused import FusedConvMixer
from convmixer_fast.spec import ConvMixerSpec, FoldedConvMixer, SizeCondition

__all__ = ["Sizes", "in_8_bits", "output_shapes", "plain_module", "tracing"]


@dataclass(frozen=True)
class Sizes:
    """The inputs that an export is for.

    Args:
        image_size: pixels, of a square, or height and width.
        dynamic_batch: whether the batch is left open.
        dynamic_size: whether height and width are.
        layout: ``"NCHW"`` or ``"NHWC"``.

    Raises:
        ValueError: ``image_size`` is no size.
    """

    image_size: int | tuple[int, int]
    dynamic_batch: bool
    dynamic_size: bool
    layout: str = "NCHW"

    def __post_init__(self) -> None:
        size = self.image_size
        pair = (size, size) if isinstance(size, int) else size
        wrong = not isinstance(pair, tuple | list | torch.Size) or len(pair) != 2
        wrong = wrong or not all(isinstance(side, int) and side > 0 for side in pair)
        if isinstance(size, bool) or wrong:
            raise ValueError(
                f"image_size must be a number of pixels, or height and width, got {size!r}"
            )

    @property
    def plane(self) -> tuple[int, int]:
        """Height and width."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    def example(self, channels: int, dtype: torch.dtype) -> Tensor:
        """Return an input to trace with: two images, where the batch is open, or else one."""
        return torch.zeros(
            self._shape(2 if self.dynamic_batch else 1, channels, *self.plane), dtype=dtype
        )

    def dynamic_shapes(self, least: Sequence[int]) -> tuple[dict[int, Any]]:
        """Return ``torch.export``'s description of what is open.

        Args:
            least: height and width, of the smallest image.
        """
        dims: dict[int, Any] = {}
        if self.dynamic_batch:
            dims[0] = torch.export.Dim("batch")
        if self.dynamic_size:
            dims[self.layout.index("H")] = torch.export.Dim("height", min=least[0])
            dims[self.layout.index("W")] = torch.export.Dim("width", min=least[1])
        return (dims,)

    def others(self, example: Tensor, patch: Sequence[int]) -> Iterator[Tensor]:
        """Yield zeros in other sizes that the export takes, where some are open.

        What depends on a size, in the model's own code, may be traced for one alone.
        """
        if self.dynamic_batch:
            yield example.new_zeros(3, *example.shape[1:])
        if self.dynamic_size:
            height, width = self.plane
            batch = 1 if self.dynamic_batch else len(example)
            sides = height + patch[0] + 1, width + 2 * patch[1] + 1
            channels = example.shape[self.layout.index("C")]
            yield example.new_zeros(self._shape(batch, channels, *sides))

    def _shape(self, images: int, channels: int, height: int, width: int) -> list[int]:
        sizes = {"N": images, "C": channels, "H": height, "W": width}
        return [sizes[name] for name in self.layout]

    def check_open(self, dims: Sequence[object]) -> None:
        """Check that what was asked to be open is open in what was traced.

        Args:
            dims: of the traced input, numbers where they are fixed.

        Raises:
            ValueError: the model's code has fixed one.
        """
        options = {"N": "dynamic_batch", "H": "dynamic_size", "W": "dynamic_size"}
        for name, option in options.items():
            index = self.layout.index(name)
            if getattr(self, option) and isinstance(dims[index], int):
                raise ValueError(
                    f"the model's own code fixes dimension {index} of its input to {dims[index]}; "
                    f"pass {option}=False"
                )

    def check(self, conditions: tuple[SizeCondition, ...]) -> None:
        """Check what the source's code asks of its input's size.

        Raises:
            ValueError: a size does not meet it, or is left open where it must not be.
        """
        for condition in conditions:
            names = compile(condition.text, "", "eval").co_names
            for name, opened in (
                ("N", self.dynamic_batch),
                ("H", self.dynamic_size),
                ("W", self.dynamic_size),
            ):
                if opened and name in names:
                    option = "dynamic_batch" if name == "N" else "dynamic_size"
                    raise ValueError(
                        f"the model's code looks at its input's size ({condition.text}), so "
                        f"that {name} cannot be left open; pass {option}=False"
                    )
            if not condition.holds(2 if self.dynamic_batch else 1, *self.plane):
                raise ValueError(
                    f"the model was recognised for sizes where {condition.text}; image_size="
                    f"{self.image_size} is none"
                )


def plain_module(
    model: nn.Module,
    form: Form,
    dtype: torch.dtype,
    sizes: Sizes,
    *,
    float32_io: bool = False,
    example_input: Tensor | None = None,
) -> tuple[PlainConvMixer, Tensor, Sizes]:
    """Return ``model`` in plain form, on the CPU, an input to trace it with, and its sizes.

    A model in 8-bit numbers becomes what their weights stand for.

    Raises:
        UnsupportedModelError: it is no ConvMixer in eval mode.
        ValueError: it does not take such sizes.
    """
    with torch.inference_mode(False), torch.no_grad():
        folded = in_8_bits(model)
        if folded is None:
            folded = fold(_recognized(model, example_input), dtype)
        else:
            # Exporting moves modules of the source's own.
            folded = copy.deepcopy(folded.in_float32())
        sizes = replace(sizes, layout=folded.input_layout)
        sizes.check(folded.conditions)
        _, stem_channels, *patch = folded.stem.weight.shape
        if any(side < p for side, p in zip(sizes.plane, patch, strict=True)):
            raise ValueError(
                f"image_size must be at least a patch, {patch[0]} x {patch[1]}, "
                f"got {sizes.image_size}"
            )
        module = PlainConvMixer(folded, form, float32_io=float32_io).cpu()
        # What stands before the stem may change the channels: those of the example, or a guess.
        channels = [*dict.fromkeys((stem_channels, 3, 1))]
        wanted = torch.float32 if float32_io else dtype
        if example_input is not None:
            channels = [example_input.shape[sizes.layout.index("C")]]
            if example_input.dtype == torch.uint8:
                wanted = torch.uint8
        return module, _accepted(module, [sizes.example(c, wanted) for c in channels]), sizes


def in_8_bits(model: nn.Module) -> FoldedConvMixer | None:
    """Return what an optimized model computes, if that is in 8-bit numbers; else None."""
    source = unwrap(model)
    if not isinstance(source, FusedConvMixer):
        return None
    folded = source.folded()
    return folded if folded.quantized_blocks() else None


def _recognized(model: nn.Module, example_input: Tensor | None) -> ConvMixerSpec:
    if isinstance(unwrap(model), FusedConvMixer):
        raise UnsupportedModelError(
            "the model is optimized already, and its kernels cannot be exported; pass the "
            f"{unwrap(model).made_from or 'model'} that it was made from"
        )
    return recognize(model, example_input)


def output_shapes(module: nn.Module, example: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and shapes of what a module returns. Nothing is computed."""
    with tracing(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        outputs = named_tensors(module(torch.empty_like(example)))
        return [(name, tuple(output.shape)) for name, output in outputs]


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Turn what PyTorch says of code that it cannot trace into this package's error.

    Stem, layers and a plain head can be traced: it is the model's own code around them.
    """
    try:
        # Autocast would become a part of what is traced.
        with TRACING, torch.autocast("cpu", enabled=False), torch.device("cpu"):
            yield
    except Exception as error:  # PyTorch's have no class in common
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = next(iter(str(cause).splitlines()), "")
        raise UnsupportedModelError(
            f"PyTorch cannot trace the model's own code before its stem or in its head "
            f"({type(cause).__name__}: {first}), as an export must; export the model without it"
        ) from error


def _accepted(module: nn.Module, examples: list[Tensor]) -> Tensor:
    for example in examples:
        try:
            output_shapes(module, example)
        except UnsupportedModelError:  # these are not its channels
            continue
        return example
    return examples[0]  # whose error is the likeliest to be the true one
