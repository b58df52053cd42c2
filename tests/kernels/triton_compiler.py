"""Compiles the Triton kernels without a device, and counts what their machine code is made of.

Run as a program it compiles those of :data:`CASES` whose names it reads, one a line, and prints
the findings as JSON: in processes of its own, because the interpreter, in which the other tests may
run, replaces the functions that are compiled. Triton keeps its results by a digest of the source.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convmixer_fast.kernels import (
    depthwise_block,
    depthwise_direct,
    depthwise_toeplitz,
    pointwise_block,
    pointwise_pointers,
    pointwise_tma,
)
from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile

CUDA = (80, 90, 100)
HIP = "gfx942"
ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


class Case(NamedTuple):
    """One kernel to compile."""

    tile: ToeplitzTile | DirectTile | PointerTile | TmaTile
    dtype: str
    targets: tuple[int | str, ...]
    """Compute capabilities, and architectures of AMD's."""
    activation: str = "gelu"
    aligned: bool = True
    """Whether sizes and strides are multiples of 16, as Triton would find out at the call."""
    kernel_size: int = 0
    side: int = 32
    """Of a Toeplitz tile's planes, which are compiled in."""
    precision: str = "ieee"
    channels_last: bool = False
    wide_offsets: bool = False

    def __str__(self) -> str:
        numbers = "-".join(str(int(number)) for number in self.tile if number is not None)
        words = [type(self.tile).__name__, numbers, self.dtype, self.activation]
        words += [f"k{self.kernel_size}"] if self.kernel_size else []
        words += [f"{self.side}px"] if isinstance(self.tile, ToeplitzTile) else []
        words += ["tf32"] if self.precision == "tf32" else []
        words += ["channels_last"] if self.channels_last else []
        words += ["int64"] if self.wide_offsets else []
        return "-".join([*words, "aligned" if self.aligned else "odd"])


def _cases() -> Iterator[Case]:
    every = (*CUDA, HIP)
    for row in depthwise_block.CONFIGS:
        if isinstance(row.tile, ToeplitzTile):
            yield from _toeplitz_cases(row)
            continue
        middle, largest = (7, 9) if row.max_kernel_size <= 9 else (17, 31)
        yield Case(row.tile, "fp16", every, kernel_size=largest)
        yield Case(row.tile, "fp32", CUDA, kernel_size=largest, aligned=False)
        yield Case(row.tile, "fp32", (90,), kernel_size=middle, wide_offsets=True)
    for product in pointwise_block.CONFIGS:
        first, limit = product.capabilities
        cuda = tuple(capability for capability in CUDA if first <= capability < limit)
        if isinstance(product.tile, TmaTile):
            for activation in ACTIVATIONS:
                yield Case(product.tile, "fp16", cuda, activation)
            yield Case(product.tile, "bf16", cuda, wide_offsets=True)
            continue
        is_16_bit = product.operands == "16-bit"
        one, other = ("fp16", "bf16") if is_16_bit else ("fp32", "fp32")
        precision = "tf32" if product.operands == "tf32" else "ieee"
        targets = every if is_16_bit and product.aligned else cuda
        yield Case(product.tile, one, targets, precision=precision)
        if product.aligned:
            yield Case(product.tile, one, (90,), precision=precision, wide_offsets=True)
        else:
            yield Case(product.tile, one, cuda, aligned=False, precision=precision)
        yield Case(
            product.tile,
            other,
            (90,),
            aligned=product.aligned,
            precision=precision,
            channels_last=True,
        )


def _toeplitz_cases(row: depthwise_block.Config) -> Iterator[Case]:
    largest = int(row.max_kernel_size)
    yield Case(row.tile, "fp16", (*CUDA, HIP), kernel_size=largest)
    yield Case(row.tile, "bf16", CUDA, kernel_size=largest, aligned=False, side=36)
    if row.min_aligned == 1:
        yield Case(row.tile, "fp16", (90,), kernel_size=largest, aligned=False, side=35)
    if row == depthwise_block.CONFIGS[0]:
        for activation in ACTIVATIONS:
            yield Case(row.tile, "fp16", CUDA, activation, kernel_size=7)
        yield Case(row.tile, "bf16", (90,), kernel_size=3, side=16)
        yield Case(row.tile, "bf16", (90,), kernel_size=5, side=16)
    if largest == 15:
        yield Case(row.tile, "bf16", (90,), kernel_size=11)


CASES = tuple(_cases())


def _constants(case: Case) -> tuple[Any, dict[str, Any]]:
    """Return the kernel of a case and what it is compiled for, launch options included."""
    tile = case.tile
    constants: dict[str, Any] = {"ACTIVATION": case.activation}
    offsets = {"OFFSET_DTYPE": tl.int64 if case.wide_offsets else tl.int32}
    if isinstance(tile, ToeplitzTile):
        vector = 8 if case.aligned else 4 if case.side % 4 == 0 else 1
        constants |= {"VECTOR": vector, "HEIGHT": case.side, "WIDTH": case.side}
        constants |= {"HAS_RESIDUAL": True, "UPCAST_DOT": False}
        constants |= depthwise_toeplitz.toeplitz_constants(tile, case.kernel_size, case.side)
        return depthwise_toeplitz._depthwise_toeplitz_kernel, constants
    if isinstance(tile, DirectTile):
        constants |= {"HAS_RESIDUAL": True} | offsets
        constants |= depthwise_direct.direct_constants(tile, case.kernel_size)
        return depthwise_direct._depthwise_direct_kernel, constants
    constants |= {"UPCAST_DOT": False} | offsets
    if isinstance(tile, TmaTile):
        return pointwise_tma._pointwise_tma_kernel, constants | pointwise_tma.tma_constants(tile)
    constants |= {"x_k_stride" if case.channels_last else "x_hw_stride": 1}
    constants |= pointwise_pointers.pointers_constants(tile, case.precision)
    return pointwise_pointers._pointwise_pointers_kernel, constants


def _signature(name: str, case: Case) -> str:
    if name in ("bias_ptr", "scale_ptr", "shift_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{case.dtype}"
    if name.endswith("_desc"):
        assert isinstance(case.tile, TmaTile)
        block = {
            "x_desc": f"1,{case.tile.BLOCK_K},{case.tile.BLOCK_HW}",
            "weight_desc": f"{case.tile.BLOCK_O},{case.tile.BLOCK_K}",
        }
        return f"tensordesc<{case.dtype}[{block[name]}]>"
    return "i32"


def compile_case(case: Case, target: int | str) -> dict[str, Any]:
    """Compile a case and return what its machine code says; of AMD's, that there is some."""
    kernel, constants = _constants(case)
    constants["PTX"] = isinstance(target, int)
    options = {name: constants.pop(name) for name in _OPTIONS if name in constants}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _signature(name, case)
        is_number = signature[name] == "i32"
        if signature[name].startswith("*") or (is_number and case.aligned and name != "images"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    if not isinstance(target, int):
        options.pop("maxnreg", None)
        compiled = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
        return {"size": len(compiled.asm["hsaco"])}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    report = _inspect(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}
    results = _results_of_a_thread(case, constants, options["num_warps"])
    return report | {"per_result": report["instructions"] / results}


def _results_of_a_thread(case: Case, constants: dict[str, Any], num_warps: int) -> float:
    if isinstance(case.tile, ToeplitzTile):
        results = case.tile.BLOCK_N * constants["ROWS"] * constants["BLOCK_W"]
    elif isinstance(case.tile, DirectTile):
        results = case.tile.BLOCK_C * case.tile.BLOCK_H * case.tile.BLOCK_W
    else:
        results = case.tile.BLOCK_O * case.tile.BLOCK_HW
    return results / (32 * num_warps)


def _inspect(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert usage, text[:1000]
    opcode = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)"
    # After the last exit there is padding, of branches to themselves and of nothing.
    opcodes = [name for name in re.findall(opcode, text, re.MULTILINE) if name != "NOP"]
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]) + int(usage[3]),
        "instructions": len(opcodes),
        "spills": sum(name in ("LDL", "STL") for name in opcodes),
        "tensor_cores": sorted(
            {name for name in opcodes if name.endswith("MMA") and len(name) > 3}
        ),
    }


RUNS = {f"{case}-{target}": (case, target) for case in CASES for target in case.targets}
"""What is compiled, by name."""


def _report(name: str) -> dict[str, Any]:
    try:
        return compile_case(*RUNS[name])
    except Exception as error:  # reported by the case's own test
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    names = sys.stdin.read().split()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        json.dump(dict(zip(names, pool.map(_report, names), strict=True)), sys.stdout)
