"""Every configuration of every Triton kernel compiles, without a device, to good code.

Each is compiled for compute capabilities 8.0, 9.0 and 10.0, some for AMD's gfx942, and its
machine code inspected: nothing spilled, shared memory that the devices have, tensor cores where
the product is one of 16-bit or TF32 operands, and for the kernels that ConvMixers run on, few
instructions a result. What is counted is what :mod:`triton_compiler` compiles.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.kernels.triton_compiler import (
    CASES,
    CUDA,
    RUNS,
    Case,
    DirectTile,
    PointerTile,
    TmaTile,
    ToeplitzTile,
)
from tests.paths import ROOT, TRITON_CACHE
from tests.sweeps import sparse

# The program that compiles is started once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("triton_compile")]

SMALLEST_SHARED = 99 * 1024
"""What a block may use on the smallest supported devices, capabilities 8.6, 8.9 and 12.0."""
HALF_SHARED = 113 * 1024
"""With that, two programs share a multiprocessor of 228 KiB, less 1 KiB each."""
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
WHOLE_SHARED = 227 * 1024
"""What a block may use on Hopper and datacenter Blackwell, where it has a multiprocessor alone."""
PUBLISHED_REGISTERS, OTHER_REGISTERS = 128, 144
"""Of kernels up to 9 x 9, for batches: 16 single warps share a multiprocessor of the device that
the tiles were chosen on, for planes like the published models'; 14 elsewhere."""

DEPTHWISE_INSTRUCTIONS = {"gelu": 22, "gelu_tanh": 19, "relu": 12}
"""A result, K = 7, fp16, sm_90, 32 x 32: the bandwidth of an H100 leaves 39 (kernels/NOTES.md)."""
POINTWISE_INSTRUCTIONS = {"gelu": 22, "gelu_tanh": 19, "relu": 13}
"""A result, sm_90, the product's loop counted once: mostly epilogue."""


def _case_of_depthwise(activation: str) -> Case:
    return next(
        case
        for case in CASES
        if isinstance(case.tile, ToeplitzTile)
        and (case.kernel_size, case.activation) == (7, activation)
    )


def _case_of_pointwise(activation: str) -> Case:
    shared = TmaTile(128, 128, 64, False, 8, 3)  # by two programs
    return next(case for case in CASES if (case.tile, case.activation) == (shared, activation))


COUNTED = [
    *map(_case_of_depthwise, DEPTHWISE_INSTRUCTIONS),
    *map(_case_of_pointwise, POINTWISE_INSTRUCTIONS),
]
"""Whose instructions are counted."""
FIRST = [
    next(case for case in CASES if type(case.tile) is tile) for tile in (DirectTile, PointerTile)
]
H100 = {f"{case}-90" for case in (*COUNTED, *FIRST)}


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """What was compiled, by name: what the tests that were chosen need."""
    items = [item for item in request.session.items if item.path == request.path]
    callspecs = [item.callspec.params for item in items if hasattr(item, "callspec")]
    names = {params["name"] for params in callspecs if "name" in params} | H100
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_compiler"],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(TRITON_CACHE),
        },
        input="\n".join(sorted(names)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("name", sparse(RUNS, H100.__contains__, ids=str))
def test_machine_code(name: str, reports: dict[str, dict[str, Any]]) -> None:
    case, target = RUNS[name]
    report = reports[name]
    assert "error" not in report, report["error"]
    if target not in CUDA:
        assert report["size"] > 0
        return
    assert report["stack"] == 0, report
    assert report["spills"] == 0, report
    limit = SMALLEST_SHARED
    if isinstance(case.tile, TmaTile):
        alone = case.tile.PERSISTENT or case.tile.num_stages * case.tile.BLOCK_O > 3 * 128
        limit = WHOLE_SHARED if alone else HALF_SHARED
    assert report["shared"] <= limit, report
    if isinstance(case.tile, ToeplitzTile):
        # The larger instructions of newer devices would take their operands from shared memory.
        assert report["tensor_cores"] == ["HMMA"], report
        if case.kernel_size <= 9 and case.side % 4 == 0 and case.tile.max_rows >= 16:
            measured = target == 90 and case.aligned
            assert report["registers"] <= (PUBLISHED_REGISTERS if measured else OTHER_REGISTERS)
    elif isinstance(case.tile, DirectTile) or (case.dtype, case.precision) == ("fp32", "ieee"):
        assert report["tensor_cores"] == [], report
    else:
        assert TENSOR_CORES[int(target)] in report["tensor_cores"], report


@pytest.mark.parametrize("activation", DEPTHWISE_INSTRUCTIONS)
def test_depthwise_instructions(activation: str, reports: dict[str, dict[str, Any]]) -> None:
    assert (
        reports[f"{_case_of_depthwise(activation)}-90"]["per_result"]
        <= DEPTHWISE_INSTRUCTIONS[activation]
    )


@pytest.mark.parametrize("activation", POINTWISE_INSTRUCTIONS)
def test_pointwise_instructions(activation: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[f"{_case_of_pointwise(activation)}-90"]
    assert report["per_result"] <= POINTWISE_INSTRUCTIONS[activation]
    # Two programs of 256 threads share the 65,536 registers of a multiprocessor.
    assert report["registers"] <= 128
