"""What is measured: a module as a user has it, its input, and how this package runs the same."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from convmixer_fast.benchmarks.work import Work
from convmixer_fast.export import to_onnx

__all__ = ["Case", "Subject"]

_DISTINCT_IMAGES = 5


@dataclass(frozen=True)
class Case:
    """One row of a sweep: what it is called and how to make it. Nothing is made before its turn."""

    bench: str
    """The op, or ``"model"``."""
    name: str
    """As people say it."""
    labels: dict[str, str | int]
    dtype: torch.dtype
    make: "Callable[[torch.device], Subject]"
    only: tuple[str, ...] | None = None
    """The providers that it is for, ``"ours"`` standing for all of this package's but the
    reference, and what suits large batches alone or is tuned for minutes; None for all."""

    seconds_share: float = 1.0
    """Of :attr:`Settings.seconds`: short calls need less time for as many readings."""
    int8: bool = False
    """Whether it is for what computes in 8-bit numbers, beside float32 for scale."""

    @property
    def precision(self) -> str:
        """The dtype's name, or ``"int8"``."""
        return "int8" if self.int8 else str(self.dtype).removeprefix("torch.")

    def wants(self, provider: str) -> bool:
        """Whether the provider of that name is to be measured."""
        ours = provider.startswith("ours") and not provider.endswith(
            ("-reference", "-chunks", "-tuned")
        )
        return self.only is None or provider in self.only or (ours and "ours" in self.only)


class Subject:
    """A module and its inputs on a device, in the forms that the providers need.

    Args:
        module: what eager PyTorch runs, in eval mode, on the device and in the dtype of the run.
        shape: (N, C, H, W) of the input.
        work: what one call must do at least.
        fuse: makes this package's form of ``module`` for a backend, with options of ``optimize`` if
            it is a model; None where there is none.
    """

    def __init__(
        self,
        module: nn.Module,
        shape: tuple[int, int, int, int],
        work: Work,
        fuse: Callable[..., nn.Module] | None,
    ) -> None:
        self.module, self.shape, self.work, self.fuse = module, shape, work, fuse
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def input(self, seed: int) -> Tensor:
        """Return a random input.

        No more than a few images differ, each standing in the batch many times: the truth is
        then known for all of a large batch at the price of a few.
        """
        generator = torch.Generator().manual_seed(seed)
        distinct = min(_DISTINCT_IMAGES, self.shape[0])
        images = torch.randn((distinct, *self.shape[1:]), generator=generator)
        images = images.to(self.device, self.dtype)
        return images[torch.arange(self.shape[0], device=self.device) % distinct]

    def truth(self, x: Tensor) -> Tensor:
        """Return what the module computes from ``x`` (made by :meth:`input`), in float64."""
        distinct = min(_DISTINCT_IMAGES, self.shape[0])
        exact: Tensor = copy.deepcopy(self.module).double()(x[:distinct].double())
        return exact[torch.arange(self.shape[0], device=self.device) % distinct]

    @cached_property
    def channels_last(self) -> nn.Module:
        """A copy of the module in channels-last memory format."""
        module = copy.deepcopy(self.module)
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    @cached_property
    def onnx(self) -> Path:
        """PyTorch's own ONNX export of the module, in a file that :meth:`close` deletes."""
        return self._pytorchs_onnx("model.onnx", self.dtype)

    @cached_property
    def float32_onnx(self) -> Path:
        """The same of the module in float32."""
        return self._pytorchs_onnx("float32.onnx", torch.float32)

    def _pytorchs_onnx(self, name: str, dtype: torch.dtype) -> Path:
        path = self.files() / name
        module, x = copy.deepcopy(self.module).to(dtype), self.input(0).to(dtype)
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # PyTorch's, of its own insides
            # Not an inference tensor, which the exporter cannot trace.
            program = torch.onnx.export(module, (x.clone(),), dynamo=True, verbose=False)
            assert program is not None
            program.save(path)
        return path

    def exported_onnx(self, form: str | None) -> Path:
        """Return this package's ONNX export, in a file that :meth:`close` deletes.

        Raises:
            LookupError: the module is no ConvMixer.
        """
        if self.fuse is None:
            raise LookupError("this package has no form of it")
        path = self.files() / f"exported-{form}.onnx"
        with torch.inference_mode(False):
            to_onnx(copy.deepcopy(self.module), path, image_size=self.shape[2:], form=form)
        return path

    @cached_property
    def calibration(self) -> Tensor:
        """Images to choose the ranges of 8-bit numbers by: those that are computed."""
        return torch.cat([self.input(seed)[:_DISTINCT_IMAGES] for seed in range(4)])

    def int8_onnx(self, depthwise: bool) -> Path:
        """Return this package's int8 ONNX export, in a file that :meth:`close` deletes.

        Args:
            depthwise: whether depthwise convolutions are quantised too.
        """
        if self.fuse is None:
            raise LookupError("this package has no form of it")
        path = self.files() / f"int8-{depthwise}.onnx"
        if not path.exists():
            with torch.inference_mode(False):
                to_onnx(
                    copy.deepcopy(self.module),
                    path,
                    image_size=self.shape[2:],
                    precision="int8",
                    calibration=self.calibration.clone(),
                    quantize_depthwise=depthwise,
                    progress=False,
                )
        return path

    def files(self) -> Path:
        """Return a folder that :meth:`close` deletes."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="convmixer_fast_bench_")
        return Path(self._folder.name)

    def close(self) -> None:
        """Delete the files made."""
        if self._folder is not None:
            self._folder.cleanup()
