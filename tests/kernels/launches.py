"""A program: what the Triton kernels are launched with, over a CUDA driver that does nothing.

``python -m tests.kernels.launches FOLDER`` builds the driver of ``cuda_stub.c`` in a folder,
launches kernels on the CPU's memory, and prints what the driver was told, as JSON. A process of
its own, because the interpreter, in which the other tests run, replaces what is launched here.
"""

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from convmixer_fast import fold, recognize
from convmixer_fast.kernels import TritonTrunk, pointwise_block
from convmixer_fast.kernels.depthwise_block import depthwise_launch
from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.launch import BoundLaunch, Epilogue, Launch
from convmixer_fast.kernels.pointwise_block import pointwise_launch
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize

CHANNELS = 64
_BYTES = {"i1": 1, "i32": 4, "i64": 8, "nvTmaDesc": 128}


class Driver(nvidia.CudaDriver):
    """Triton's own, but for what it asks PyTorch about the device."""

    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: (9, 0)
        self.set_current_device = lambda device: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Recorder:
    """Keeps the bytes of every parameter of every launch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.launches: list[dict[str, Any]] = []
        self._sizes: dict[int, list[int]] = {}
        kind = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
        )
        self._listener = kind(self._listen)  # kept alive
        self._library = library
        library.stub_listen(self._listener)
        real = Launch.run

        def run(launch: Launch) -> Any:
            compiled = real(launch)
            self._sizes[compiled.function] = _parameter_bytes(compiled.src.signature)
            return compiled

        Launch.run = run  # type: ignore[method-assign]

    def _listen(self, function: int, programs: int, params: Any) -> None:
        # What is launched for the first time has parameters of unknown size.
        sizes = self._sizes.get(function, [])
        values = [ctypes.string_at(params[i], size).hex() for i, size in enumerate(sizes)]
        name = ctypes.string_at(function).decode()
        self.launches.append({"kernel": name, "programs": programs, "params": values})

    def of(self, run: Callable[[], object]) -> list[dict[str, Any]]:
        """Run twice, and return what was launched the second time."""
        run()
        self.launches.clear()
        run()
        return list(self.launches)

    def stop(self) -> None:
        self._library.stub_listen(None)


def _parameter_bytes(signature: dict[str, str]) -> list[int]:
    sizes = []
    for kind in signature.values():
        if kind.startswith("tensordesc"):
            rank = kind[kind.index("[") : kind.index("]")].count(",") + 1
            sizes += [_BYTES["nvTmaDesc"], *[_BYTES["i32"]] * rank, *[_BYTES["i64"]] * rank]
        elif kind != "constexpr":
            sizes.append(8 if kind.startswith("*") else _BYTES[kind])
    return sizes


def build(folder: Path) -> ctypes.CDLL:
    """Compile the driver, load it in the place of libcuda, and make Triton use it."""
    include = Path(nvidia.__file__).parent / "include"
    path = folder / "libcuda.so.1"
    source = Path(__file__).with_name("cuda_stub.c")
    command = ["cc", "-shared", "-fPIC", "-O1", f"-I{include}", str(source), "-o", str(path)]
    subprocess.run([*command, f"-Wl,-soname,{path.name}"], check=True)
    (folder / "libcuda.so").symlink_to(path.name)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    knobs.nvidia.libcuda_path = str(folder)
    triton.runtime.driver.set_active(Driver())
    return library


def cases() -> dict[str, tuple[Launch, Any, Tensor]]:
    """Return a launch of each kernel, and other memory for x and the result."""
    x, other, out, other_out = (torch.randn(4, CHANNELS, 32, 32).half() for _ in range(4))
    vectors = [torch.randn(CHANNELS) for _ in range(3)]
    epilogue = Epilogue(*vectors, "relu")
    taps = torch.randn(CHANNELS, 1, 3, 3).half()
    rows = torch.randn(CHANNELS, CHANNELS).half()
    without_scale = Epilogue(vectors[0], None, vectors[2], "gelu")
    direct, pointers = DirectTile(1, 32, 32, None, None, 4), PointerTile(64, 64, 64, 4, 3)
    tma = pointwise_launch(x.flatten(2), rows, epilogue, out)
    description = BoundLaunch(tma).description
    assert description is not None, "not through the TMA"
    return {
        "toeplitz": (depthwise_launch(x, taps, epilogue, out, True), other, other_out),
        "direct": (depthwise_launch(x, taps, without_scale, out, True, direct), other, other_out),
        "tma": (tma, description.of(other), other_out),
        "pointers": (
            pointwise_launch(x.flatten(2), rows, without_scale, out, pointers),
            other,
            other_out,
        ),
    }


def microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the fastest of some thousand of each call: another process may have the processor.

    They take turns, so that a processor that slows down slows all of them.
    """
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(1000):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], 1e6 * (time.perf_counter() - start))
    return best


def main() -> None:
    """Print, by kernel, the launches through Triton's dispatch and bound ones; those of a model."""
    recorder = Recorder(build(Path(sys.argv[1])))
    pointwise_block.capability = lambda x: 90
    found: dict[str, Any] = {}
    bound = {}
    for name, (launch, x, out) in cases().items():
        bound[name] = BoundLaunch(launch)
        moved = launch._replace(x=x, out=out)
        found[name] = {
            "dispatched": recorder.of(moved.run),
            "bound": recorder.of(lambda name=name, x=x, out=out: bound[name](x, out)),
        }
    model = randomize(Architecture(CHANNELS, 3, 3, 4, "relu", 3, 10).build())
    folded = fold(recognize(model), torch.float16)
    images = torch.randn(5, 3, 64, 64).half()
    for chunk in (None, 2):
        trunk = TritonTrunk(folded.stem, folded.layers, folded.head, chunk=chunk)
        found[f"trunk {chunk}"] = recorder.of(lambda trunk=trunk: trunk(images, "logits"))
    recorder.stop()
    for name, (launch, x, out) in cases().items():
        found[name] |= microseconds(
            {
                "dispatched_us": launch.run,
                "bound_us": lambda name=name, x=x, out=out: bound[name](x, out),
            }
        )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
