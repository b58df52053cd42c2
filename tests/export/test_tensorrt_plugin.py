"""The depthwise plugin for TensorRT: PTX that assembles well, parameters in TensorRT's order."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from convmixer_fast.errors import BackendUnavailableError
from convmixer_fast.export.trt_plugin import DepthwisePlugin, adapt, depthwise_op
from convmixer_fast.kernels import depthwise_toeplitz
from convmixer_fast.kernels.launch import is_interpreted
from convmixer_fast.spec import FoldedBlock
from tests.export.tensorrt_ptx_cases import RUNS
from tests.paths import ROOT, TRITON_CACHE
from tests.sweeps import sparse

# As Triton writes it: pointers, integers, two pointers to scratch memory.
TRITON = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry depthwise(
.param .u64 x, .param .u64 w, .param .u64 y,
.param .u32 batch, .param .u32 rows, .param .u64 scratch, .param .u64 profile
) { ld.param.b64 %rd1, [x]; ret; }
"""


# The program that assembles is started once.
pytestmark = pytest.mark.xdist_group("tensorrt_ptx")


@pytest.fixture(scope="module")
def assembled(request):
    items = [item for item in request.session.items if item.path == request.path]
    chosen = [item.callspec.params for item in items if hasattr(item, "callspec")]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.export.tensorrt_ptx"],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(TRITON_CACHE),
        },
        input="\n".join(params["name"] for params in chosen if "name" in params),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", sparse(RUNS, lambda name: False))
def test_ptx_assembles_without_spills(assembled, name):
    _, capability = RUNS[name]
    found = assembled[name]
    assert found["version"] == "8.6"
    assert found["target"] == f"sm_{capability}"
    assert (found["spilled"], found["stack"]) == (0, 0)
    # More than TensorRT is known to ask the driver for.
    assert found["shared"] <= 48 * 1024
    expected = ["u64"] * found["inputs"] + ["u32"] * found["scalars"] + ["u64"]
    assert found["parameters"] == expected


def test_adapt_orders_parameters_as_tensorrt_passes_them():
    text = adapt(TRITON, "depthwise", 2).decode()
    entry = text[text.index("(") : text.index(")")]
    names = [line.split()[-1].strip(",") for line in entry[1:].splitlines()]
    assert names == ["x", "w", "batch", "rows", "y"]
    assert ".target sm_90\n" in text


def test_adapt_refuses_what_tensorrt_cannot_launch():
    with pytest.raises(ValueError, match="depthwise uses scratch memory, .* none of: .'scratch'"):
        adapt(TRITON.replace("[x]", "[scratch]"), "depthwise", 2)
    with pytest.raises(ValueError, match="the PTX has no kernel 'other'"):
        adapt(TRITON, "other", 2)


def block(channels=8, kernel_size=3, dtype=torch.float16):
    weight = torch.empty(channels, 1, kernel_size, kernel_size, dtype=dtype)
    return FoldedBlock(weight, None, torch.empty(channels), None, "relu")


@pytest.mark.parametrize("shape", [(1, 40, 13, 11), (9, 40, 32, 32), (7, 64, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_grid_and_integers_are_those_of_the_launcher(shape, dtype):
    plugin = DepthwisePlugin.of(block(shape[1], 5, dtype), shape, 90)
    for images in (1, 2, 31):
        launch = plugin.launch(images)
        assert plugin.grid(images, lambda a, b: -(-a // b)) == launch.programs
        assert tuple(plugin.scalars(images)) == launch.sizes


def test_names_differ_where_plugins_do():
    shapes = [(1, 8, 16, 16), (1, 8, 16, 17), (4096, 8, 16, 16)]
    plugins = [DepthwisePlugin.of(block(dtype=d), s, c) for d in (torch.float16, torch.bfloat16)
               for s in shapes for c in (80, 90)]  # fmt: skip
    names = {plugin.name for plugin in plugins}
    assert len(names) == len(plugins)
    assert all(name.isidentifier() for name in names)
    assert plugins[0].inputs() == ("x", "weight", "scale")


@pytest.mark.skipif(
    not is_interpreted(depthwise_toeplitz._depthwise_toeplitz_kernel),
    reason="needs Triton's interpreter, TRITON_INTERPRET=1",
)
def test_the_interpreter_compiles_nothing():
    with pytest.raises(BackendUnavailableError, match="interpreter .* unset that"):
        DepthwisePlugin.of(block(), (1, 8, 16, 16), 90).kernel()


def test_old_devices_are_refused():
    with pytest.raises(ValueError, match=r"needs compute capability 8.0 .* got 75; use plugins"):
        depthwise_op((1, 8, 16, 16), 75)
