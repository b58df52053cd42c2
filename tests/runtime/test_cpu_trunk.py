"""The CPU engine: a whole trunk in one call, against the reference in float64 and the ops."""

import copy
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip(
    "convmixer_fast._C",
    reason="needs the compiled extension: CONVMIXER_FAST_EXT=1 pip install .",
)

from convmixer_fast import fold, recognize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import cpu
from convmixer_fast.runtime.cpu import CpuTrunk
from tests.runtime.cpu_cases import check_threads, run_python
from tests.sweeps import sparse

ARCHITECTURES = {
    "odd": (Architecture(40, 3, 5, 3, "gelu"), (2, 3, 40, 35)),
    "one-channel": (Architecture(1, 2, 3, 1, "gelu", in_chans=1), (3, 1, 9, 7)),
    "one-position": (Architecture(33, 2, 7, 4, "relu"), (3, 3, 4, 4)),
    "no-layers": (Architecture(17, 0, 3, 2, "gelu"), (2, 3, 8, 8)),
    "tiles": (Architecture(24, 2, 3, 1, "gelu_tanh"), (1, 3, 37, 41)),
    "large-kernel": (Architecture(16, 2, 11, 1, "relu"), (1, 3, 12, 20)),
    "larger-than-image": (Architecture(20, 1, 31, 2, "gelu"), (1, 3, 14, 10)),
    "wide": (Architecture(256, 2, 5, 1, "gelu"), (2, 3, 11, 13)),
    "wide-one-position": (Architecture(256, 1, 3, 2, "gelu"), (1, 3, 2, 2)),
    "wide-tiles": (Architecture(320, 1, 7, 1, "relu"), (1, 3, 29, 31)),
}
cases = pytest.mark.parametrize("case", ARCHITECTURES.values(), ids=ARCHITECTURES)


def make(architecture: Architecture, seed: int = 0):
    model = randomize(architecture.build(), seed)
    folded = fold(recognize(model))
    return model, CpuTrunk(folded.stem, folded.layers)


def check(architecture, shape) -> None:
    model, trunk = make(architecture)
    x = torch.randn(shape)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        features = exact.forward_features(x.double())
        eager = relative_error(model.forward_features(x), features)
    out = trunk(x, "features")
    assert out.shape == features.shape
    assert relative_error(out, features) <= max(2 * eager, 1e-6)
    mean = trunk(x, "mean")
    assert relative_error(mean, features.mean((2, 3))) <= max(2 * eager, 1e-6)


def check_all() -> None:
    """For a process of its own per ISA."""
    torch.manual_seed(0)
    for case in ARCHITECTURES.values():
        check(*case)


@cases
def test_trunks(case):
    check(*case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layers_that_change_the_width(activation):
    folded = [
        fold(recognize(randomize(Architecture(dim, 1, 3, 2, activation).build())))
        for dim in (40, 72)
    ]
    widened = replace(folded[0].layers[0].pointwise, weight=torch.randn(72, 40, 1, 1) / 6)
    widened = replace(widened, bias=None, scale=None, shift=torch.randn(72))
    layers = (replace(folded[0].layers[0], pointwise=widened), folded[1].layers[0])
    x = torch.randn(2, 3, 14, 10)
    out = CpuTrunk(folded[0].stem, layers)(x, "features")
    y = cpu.patch_embed_cpu(x, *_arguments(folded[0].stem))
    for layer in layers:
        y = cpu.depthwise_block_cpu(y, *_arguments(layer.depthwise), True)
        y = cpu.pointwise_block_cpu(y, *_arguments(layer.pointwise))
    assert relative_error(out, y) < 1e-6


def _arguments(block):
    return block.weight, block.bias, block.scale, block.shift, block.activation


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["odd", "wide", "tiles"])
def test_results_do_not_depend_on_threads(name, batch):
    architecture, shape = ARCHITECTURES[name]
    _, trunk = make(architecture)
    x = torch.randn(batch, *shape[1:])
    check_threads(trunk, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_images_are_rounded_once(dtype):
    _, trunk = make(Architecture(24, 3, 5, 2, "gelu"))
    x = torch.randn(2, 3, 12, 12).to(dtype)
    out = trunk(x, "features")
    assert out.dtype == dtype
    assert torch.equal(out, trunk(x.float(), "features").to(dtype))


def test_no_images_and_strides():
    _, trunk = make(Architecture(24, 1, 3, 2, "gelu"))
    assert trunk(torch.empty(0, 3, 8, 6), "features").shape == (0, 24, 4, 3)
    assert trunk(torch.empty(0, 3, 8, 6), "mean").shape == (0, 24)
    x = torch.randn(2, 3, 8, 6)
    expected = trunk(x, "features")
    assert torch.equal(trunk(x.to(memory_format=torch.channels_last), "features"), expected)
    assert torch.equal(trunk(torch.stack((x, -x), 4)[..., 0], "features"), expected)


@pytest.mark.parametrize("channels", [40, 256])
def test_nan_reaches_its_window_alone(channels):
    _, trunk = make(Architecture(channels, 1, 3, 1, "gelu"))
    x = torch.randn(1, 3, 9, 9)
    x[0, 1, 4, 5] = float("nan")
    out = trunk(x, "features")
    touched = out.isnan().any(1)[0]
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 4:7] = True
    assert torch.equal(touched, expected)


@pytest.mark.slow
@pytest.mark.parametrize("batch", sparse([1, 16], lambda batch: False))
def test_memory_of_a_call(batch):
    """Besides its output a call takes two activations of an image for each thread, and tiles."""
    code = f"""
        import json, torch
        from convmixer_fast.benchmarks.memory import peak_memory
        from tests.runtime.test_cpu_trunk import make
        from convmixer_fast.models.published import Architecture
        torch.set_num_threads(2)
        _, trunk = make(Architecture(256, 2, 5, 1, "gelu"))
        trunk(torch.randn(1, 3, 8, 8), "mean")
        x = torch.randn({batch}, 3, 160, 160)
        peak = peak_memory(x.device, lambda x: trunk(x, "mean"), x)[1]
        print(json.dumps(peak))
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    if peak is None:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    activation = 4 * 256 * 160 * 160
    threads = 1 if batch == 1 else 2  # one image is shared by both
    assert peak <= 1.15 * 2 * activation * threads
