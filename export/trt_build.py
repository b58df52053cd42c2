"""One build of a TensorRT engine: a network from a model or a file, settings, a plan."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convmixer_fast.errors import TensorRTError
from convmixer_fast.export.trt_bindings import Log, torch_dtype
from convmixer_fast.export.trt_network import DepthwiseOp, add_convmixer
from convmixer_fast.export.trt_progress import BuildProgress
from convmixer_fast.spec import FoldedConvMixer
from convmixer_fast.support.files import write_whole

__all__ = ["Build", "TensorInfo"]


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of an engine."""

    name: str
    dtype: str
    """As PyTorch calls it: ``"float16"`` ..."""
    shape: tuple[int, ...]
    """With -1 for the batch where that is free."""


class Build:
    """TensorRT's builder and what it is given, in order: a network, settings, a profile.

    Args:
        trt: the bindings.

    Raises:
        TensorRTError: TensorRT has no builder here, for want of a GPU or a driver for example.
    """

    def __init__(self, trt: Any) -> None:
        self._trt = trt
        self._log = Log(trt)
        try:
            self._builder = trt.Builder(self._log.logger)
        except (TypeError, RuntimeError) as error:  # a TypeError where it is a null pointer
            raise self._log.error(f"TensorRT cannot build engines here ({error})") from error
        # 11 ignores the flag, having no other networks; 10 needs it.
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self._network = self._builder.create_network(flags)
        self._config = self._builder.create_builder_config()
        self._held: list[Any] = []
        """What TensorRT refers to until the engine is built."""

    def fill(
        self, folded: FoldedConvMixer, image_size: tuple[int, int], depthwise: DepthwiseOp | None
    ) -> None:
        """Make the network of a model; see :func:`trt_network.add_convmixer`."""
        try:
            held = add_convmixer(self._trt, self._network, folded, image_size, depthwise)
        except TensorRTError as error:
            raise self._log.error(str(error)) from error
        self._held.append(held)

    def parse(self, path: Path) -> None:
        """Make the network of an ONNX file.

        Raises:
            TensorRTError: TensorRT cannot parse it; has all that the parser says.
        """
        parser = self._trt.OnnxParser(self._network, self._log.logger)
        self._held.append(parser)
        if not parser.parse_from_file(str(path)):
            errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
            said = "\n".join(f"  {error}" for error in errors) or "  the parser gives no reason"
            self._log.errors.clear()  # the same, in other words
            raise TensorRTError(f"TensorRT cannot parse {path}:\n{said}")

    def configure(self, workspace: int | None, version_compatible: bool, tf32: bool) -> None:
        """Set what :func:`trt_engine.to_tensorrt` explains."""
        trt = self._trt
        if workspace is not None:
            self._config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if version_compatible:
            self._config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if not tf32:  # which is TensorRT's default
            self._config.clear_flag(trt.BuilderFlag.TF32)

    def add_profile(self, batches: tuple[int, int, int], image_size: tuple[int, int]) -> None:
        """Say which shapes the input may have.

        Args:
            batches: smallest, usual, largest.
            image_size: (H, W).

        Raises:
            ValueError: the network's input is not (N, C, H, W), or has other sizes.
            TensorRTError: TensorRT does not take the profile.
        """
        name, shape = self._input()
        if any(found not in (-1, side) for found, side in zip(shape[2:], image_size, strict=True)):
            raise ValueError(
                f"the file takes images of {shape[2]} x {shape[3]} and image_size is {image_size}; "
                "pass the file's own size"
            )
        if shape[0] != -1 and batches != (shape[0],) * 3:
            raise ValueError(
                f"the file takes batches of {shape[0]} alone; pass min_batch={shape[0]} and "
                f"max_batch={shape[0]}, or export it with a dynamic batch"
            )
        profile = self._builder.create_optimization_profile()
        profile.set_shape(name, *((n, shape[1], *image_size) for n in batches))
        if self._config.add_optimization_profile(profile) < 0:
            raise self._log.error(f"TensorRT does not take the batches {batches}")

    def _input(self) -> tuple[str, tuple[int, ...]]:
        """Return the name and shape of the one input."""
        if self._network.num_inputs != 1:
            raise ValueError(
                f"expected a network with one input (N, C, H, W), found {self._network.num_inputs}"
            )
        source = self._network.get_input(0)
        shape = tuple(source.shape)
        if len(shape) != 4 or shape[1] < 1:
            raise ValueError(
                f"expected an input (N, C, H, W), C fixed, found {source.name} {shape}"
            )
        return source.name, shape

    def run(self, timing_cache: Path | None, shown: bool) -> bytes:
        """Build the engine; ``timing_cache`` is read before and written after it.

        Raises:
            TensorRTError: there is no engine; has what TensorRT's log says.
        """
        if timing_cache is not None:
            self._read_cache(timing_cache)
        with BuildProgress(self._trt, shown) as progress:
            self._config.progress_monitor = progress.monitor
            plan = self._builder.build_serialized_network(self._network, self._config)
        if plan is None:
            raise self._log.error("TensorRT could not build the engine")
        if timing_cache is not None:
            cache = self._config.get_timing_cache()
            if cache is not None:
                write_whole(timing_cache, self.content(cache.serialize()))
        return self.content(plan)

    def _read_cache(self, path: Path) -> None:
        content = path.read_bytes() if path.is_file() else b""
        cache = self._config.create_timing_cache(content)
        if content and (cache is None or not self._config.set_timing_cache(cache, False)):
            warnings.warn(
                f"the timing cache {path} is of another GPU or TensorRT version, or damaged; it is "
                "begun anew",
                RuntimeWarning,
                stacklevel=4,
            )
            content, cache = b"", self._config.create_timing_cache(b"")
        if not content and not self._config.set_timing_cache(cache, False):
            raise self._log.error("TensorRT refused a new timing cache")
        self._held.append(cache)  # it does not belong to the settings

    def content(self, memory: Any) -> bytes:
        """Return a copy of what TensorRT holds in an ``IHostMemory``."""
        return bytes(memory)

    def tensors(self) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        """Return the inputs and the outputs."""
        network = self._network
        inputs = (network.get_input(i) for i in range(network.num_inputs))
        outputs = (network.get_output(i) for i in range(network.num_outputs))
        return tuple(map(self._describe, inputs)), tuple(map(self._describe, outputs))

    def _describe(self, tensor: Any) -> TensorInfo:
        dtype = str(torch_dtype(self._trt, tensor.dtype)).removeprefix("torch.")
        return TensorInfo(tensor.name, dtype, tuple(tensor.shape))
