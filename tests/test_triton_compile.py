"""Every configuration of every Triton kernel compiles, without a device, to good code.

Each row is compiled for compute capabilities 8.0, 9.0 and 10.0, and its machine code
inspected: nothing spilled, shared memory that every supported device has, and tensor
cores where the product is one of 16-bit or TF32 operands. All compilations happen in one
subprocess, because the interpreter, in which the other tests may run, replaces the
functions that are compiled. Triton caches its results: only the first run takes long.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

from convmixer_fast.kernels import depthwise_block, pointwise_block

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = 99 * 1024
"""What a block may use on the smallest supported devices, capabilities 8.6, 8.9 and 12.0."""
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


class Case(NamedTuple):
    """One kernel to compile."""

    op: str
    row: int
    dtype: str
    aligned: bool
    """Whether sizes and strides are multiples of 16, as Triton would find out at the call."""
    kernel_size: int = 1
    channels_last: bool = False

    def __str__(self) -> str:
        detail = f"-k{self.kernel_size}" if self.op == "depthwise" else ""
        detail += "-channels_last" if self.channels_last else ""
        return f"{self.op}{self.row}-{self.dtype}{detail}-{'aligned' if self.aligned else 'odd'}"


def _cases() -> list[Case]:
    cases = []
    for index, row in enumerate(depthwise_block.CONFIGS):
        middle, large = (7, 9) if row.max_kernel_size <= 9 else (13, 31)
        cases.append(Case("depthwise", index, "fp16", True, large))
        cases.append(Case("depthwise", index, "bf16", False, middle))
        cases.append(Case("depthwise", index, "fp32", False, large))
    for index, product in enumerate(pointwise_block.CONFIGS):
        first, second = ("fp16", "bf16") if product.operands == "16-bit" else ("fp32", "fp32")
        cases.append(Case("pointwise", index, first, True))
        cases.append(Case("pointwise", index, second, product.aligned, channels_last=True))
        if not product.aligned:
            cases.append(Case("pointwise", index, first, False))
    return cases


CASES = _cases()


def _compile(case: Case, capability: int) -> dict[str, Any]:
    """Compile a case and return what its machine code says."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[str, Any] = {"ACTIVATION": "gelu", "OFFSET_DTYPE": tl.int32}
    constants |= {"HAS_BIAS": True, "HAS_SCALE": True, "HAS_SHIFT": True}
    options: dict[str, Any] = {"enable_fp_fusion": True}
    row: Any
    if case.op == "depthwise":
        row = depthwise_block.CONFIGS[case.row]
        kernel = depthwise_block._depthwise_block_kernel
        constants |= {"KERNEL_SIZE": case.kernel_size, "HAS_RESIDUAL": True}
        constants["UNROLLED_TAPS"] = row.unrolled_taps or case.kernel_size
        options["maxnreg"] = row.max_registers
    else:
        row = pointwise_block.CONFIGS[case.row]
        kernel = pointwise_block._pointwise_block_kernel
        constants["INPUT_PRECISION"] = "tf32" if row.operands == "tf32" else "ieee"
        constants |= {"UPCAST_DOT": False}
        constants |= {"x_k_stride" if case.channels_last else "x_hw_stride": 1}
    constants |= {name: value for name, value in row._asdict().items() if name.startswith("BLOCK")}
    options |= {"num_warps": row.num_warps, "num_stages": row.num_stages}

    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        is_pointer = name.endswith("_ptr")
        if name in constants:
            signature[name] = "constexpr"
        elif is_pointer:
            is_vector = name in ("bias_ptr", "scale_ptr", "shift_ptr")
            signature[name] = "*fp32" if is_vector else f"*{case.dtype}"
        else:
            signature[name] = "i32"
        if name not in constants and (is_pointer or case.aligned):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _inspect(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def _inspect(cubin: bytes) -> dict[str, Any]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert usage, text[:1000]
    opcode = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)"
    opcodes = re.findall(opcode, text, re.MULTILINE)
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]) + int(usage[3]),
        "instructions": len(opcodes),
        "spills": sum(name in ("LDL", "STL") for name in opcodes),
        "tensor_cores": sorted(
            {name for name in opcodes if name.endswith("MMA") and len(name) > 3}
        ),
    }


def _compile_all() -> dict[str, dict[str, Any]]:
    reports: dict[str, dict[str, Any]] = {}
    for capability in CAPABILITIES:
        for case in CASES:
            try:
                report = _compile(case, capability)
            except Exception as error:  # reported by the case's own test
                report = {"error": f"{type(error).__name__}: {error}"}
            reports[f"{case}-{capability}"] = report
    return reports


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, "-m", "tests.test_triton_compile"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_machine_code(case: Case, capability: int, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[f"{case}-{capability}"]
    assert "error" not in report, report["error"]
    assert report["stack"] == 0, report
    assert report["spills"] == 0, report
    assert report["shared"] <= SHARED_LIMIT, report
    if case.op == "pointwise" and pointwise_block.CONFIGS[case.row].operands != "ieee":
        assert TENSOR_CORES[capability] in report["tensor_cores"], report


if __name__ == "__main__":
    json.dump(_compile_all(), sys.stdout)
