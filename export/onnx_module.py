"""``OnnxModule``: an ONNX file as an ``nn.Module``, run by ONNX Runtime."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from convmixer_fast.errors import (
    BackendUnavailableError,
    ExportedFileError,
    MissingDependencyError,
)
from convmixer_fast.export.metadata import Description, read_description

__all__ = ["OnnxModule"]

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
}
_ELEMENTS = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}
_ELEMENTS |= {torch.float64: 11, torch.uint8: 2}
"""ONNX's numbers for them."""

Provider = str | tuple[str, Mapping[str, Any]]


class OnnxModule(nn.Module):
    """What an ONNX file computes, drop-in for the model that it was exported from.

    On a GPU input and outputs stay there: ONNX Runtime reads the tensor's memory and its results
    become tensors without a copy. A copy of the module, or one that was pickled, opens the file
    again when it is called.

    Args:
        path: of the file.
        device: where tensors are: ``"cpu"``, or ``"cuda"`` with ``onnxruntime-gpu``.
        providers: ONNX Runtime's execution providers, with or without options, such as
            ``["TensorrtExecutionProvider", "CUDAExecutionProvider"]``; None takes the device's.
        threads: on a CPU; None is ``torch.get_num_threads()``.

    Attributes:
        description: what the file says of the model, its images and its labels.

    Raises:
        FileNotFoundError: there is no such file.
        MissingDependencyError: ONNX Runtime is not installed.
        BackendUnavailableError: ONNX Runtime cannot run the file there; says why.
        ExportedFileError: the file takes something else than images, or its metadata is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.path = Path(path).resolve()
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be a CPU or a CUDA device, got {device!r}")
        self._providers = None if providers is None else tuple(providers)
        self._threads = threads
        self._session: Any = None
        self.description: Description = self._open()
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def __deepcopy__(self, memo: object) -> "OnnxModule":
        return OnnxModule(
            self.path, device=self.device, providers=self._providers, threads=self._threads
        )

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Any:
        """Map images (N, C, H, W) to what the model returns; several outputs are a tuple.

        Raises:
            TypeError: the dtype is not the file's, or the tensor is somewhere else.
            ValueError: the shape is not the file's.
        """
        if self._session is None:
            self._open()
        self._check(x)
        with torch.no_grad():
            outputs = self._run_on_cpu(x) if self.device.type == "cpu" else self._run_on_gpu(x)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def extra_repr(self) -> str:
        """Return the file and the device."""
        return f"{self.path.name!r}, device={str(self.device)!r}"

    def _open(self) -> Description:
        try:
            runtime: Any = importlib.import_module("onnxruntime")
        except ImportError as error:
            raise MissingDependencyError(
                f"OnnxModule needs ONNX Runtime ({error}): pip install onnxruntime, or "
                "onnxruntime-gpu for CUDA"
            ) from error
        if not self.path.is_file():
            raise FileNotFoundError(f"no ONNX file at {self.path}")
        wanted = self._providers or self._default_providers()
        names = [p if isinstance(p, str) else p[0] for p in wanted]
        missing = [name for name in names if name not in runtime.get_available_providers()]
        if missing:
            raise BackendUnavailableError(
                f"the ONNX Runtime installed has no {', '.join(missing)}, only "
                f"{', '.join(runtime.get_available_providers())}; pip install onnxruntime-gpu"
            )
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads or torch.get_num_threads()
        try:
            session = runtime.InferenceSession(str(self.path), options, providers=list(wanted))
        except Exception as error:  # its errors have no common class but this one
            raise BackendUnavailableError(
                f"ONNX Runtime cannot run {self.path}: {error}"
            ) from error
        if session.get_providers()[0] != names[0]:
            raise BackendUnavailableError(
                f"ONNX Runtime fell back from {names[0]} to {session.get_providers()[0]}"
            )
        self._session = session
        entries = session.get_inputs()
        if len(entries) != 1 or entries[0].type not in _DTYPES:
            found = ", ".join(f"{entry.name} of {entry.type}" for entry in entries) or "none"
            raise ExportedFileError(
                f"{self.path.name}: expected one input, images of float16, bfloat16, float32, "
                f"float64 or uint8, found {found}"
            )
        entry = entries[0]
        self._input, self._shape, self._dtype = entry.name, entry.shape, _DTYPES[entry.type]
        self._outputs = [output.name for output in session.get_outputs()]
        return read_description(session.get_modelmeta().custom_metadata_map)

    def _default_providers(self) -> list[Provider]:
        if self.device.type == "cpu":
            return ["CPUExecutionProvider"]
        # PyTorch's own stream, on which the input is made and the outputs are read.
        stream = str(torch.cuda.current_stream(self.device).cuda_stream)
        options = {"device_id": str(self._index()), "user_compute_stream": stream}
        return [("CUDAExecutionProvider", options)]

    def _index(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def _check(self, x: Tensor) -> None:
        if x.dtype != self._dtype:
            raise TypeError(f"{self.path.name} takes {self._dtype}, got {x.dtype}")
        if x.device.type != self.device.type:
            raise TypeError(f"this OnnxModule is for {self.device}, and the input is on {x.device}")
        # Sizes that are open have names.
        fits = len(self._shape) == x.dim() and all(
            not isinstance(want, int) or want == size
            for want, size in zip(self._shape, x.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(map(str, self._shape))
            raise ValueError(f"{self.path.name} takes images ({wanted}), got {tuple(x.shape)}")

    def _run_on_cpu(self, x: Tensor) -> list[Tensor]:
        given = {self._input: x.detach().contiguous().numpy()}
        try:
            found = self._session.run(self._outputs, given)
        except Exception as error:  # its errors have no common class but this one
            raise ValueError(
                f"ONNX Runtime cannot run {self.path.name} on images {tuple(x.shape)}: {error}"
            ) from error
        return [torch.from_numpy(values) for values in found]

    def _run_on_gpu(self, x: Tensor) -> list[Tensor]:
        x = x.detach().contiguous()
        index = self._index()
        binding = self._session.io_binding()
        binding.bind_input(
            self._input, "cuda", index, _ELEMENTS[x.dtype], tuple(x.shape), x.data_ptr()
        )
        for name in self._outputs:
            binding.bind_output(name, "cuda", index)
        stream = torch.cuda.current_stream(self.device)
        stream.synchronize()  # the session's stream may be another one
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        values = binding.get_outputs()
        return [from_dlpack(value._ortvalue.to_dlpack()) for value in values]
