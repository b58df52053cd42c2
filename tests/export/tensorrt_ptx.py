"""A program: the PTX of TensorRT plugins, assembled by ptxas; prints what it says, as JSON.

It reads the names of those that are wanted, one a line.

In a process of its own: Triton's interpreter, in which the other tests may run, compiles nothing.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from triton import knobs

from convmixer_fast.export.trt_plugin import DepthwisePlugin
from convmixer_fast.spec import FoldedBlock
from tests.export.tensorrt_ptx_cases import RUNS, Case


class Assembled(NamedTuple):
    """What PTX declares, and what becomes of it."""

    version: str
    target: str
    parameters: list[str]
    registers: int
    spilled: int
    stack: int
    shared: int
    warps: int
    inputs: int
    scalars: int


def assemble(case: Case, capability: int) -> Assembled:
    """Compile a case and assemble what TensorRT would get."""
    channels = case.shape[1]
    dtype = getattr(torch, case.dtype)
    weight = torch.empty(channels, 1, case.kernel_size, case.kernel_size, dtype=dtype)
    bias = torch.empty(channels) if case.bias else None
    block = FoldedBlock(weight, bias, torch.empty(channels), torch.empty(channels), case.activation)
    plugin = DepthwisePlugin.of(block, case.shape, capability)
    kernel = plugin.kernel()
    text = kernel.ptx.decode()
    entry = re.search(rf"\.entry {kernel.name}\((.*?)\)", text, re.DOTALL)
    assert entry
    # One of the two knows the new devices.
    tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_bytes(kernel.ptx)
        command = [tool.path, "-v", f"--gpu-name=sm_{capability}", str(source)]
        command += ["-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert stack, said
    assert registers, said
    return Assembled(
        version=re.findall(r"^\.version (.*)$", text, re.MULTILINE)[0],
        target=re.findall(r"^\.target (.*)$", text, re.MULTILINE)[0],
        parameters=re.findall(r"\.param \.(\w+)", entry[1]),
        registers=int(registers[1]),
        spilled=int(stack[2]),
        stack=int(stack[1]),
        shared=kernel.shared,
        warps=kernel.warps,
        inputs=len(plugin.inputs()),
        scalars=len(plugin.scalars(1)),
    )


if __name__ == "__main__":
    json.dump(
        {name: assemble(*RUNS[name])._asdict() for name in sys.stdin.read().split()}, sys.stdout
    )
