"""Weights that are held in packed form alone."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch

from convmixer_fast import BackendUnavailableError, ConvMixer, optimize
from convmixer_fast.errors import ReleasedWeightsError
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import backends
from tests.variants import VARIANTS

pytestmark = pytest.mark.skipif(
    backends.why_not("cpu", torch.device("cpu"), torch.float32) is not None,
    reason="needs the compiled extension",
)


@pytest.fixture
def model():
    return randomize(ConvMixer(24, 2, kernel_size=5, patch_size=4, num_classes=7))


def test_the_same_bits(model):
    kept, released = optimize(model), optimize(model, release=True)
    with torch.inference_mode():
        for shape in ((1, 3, 4, 4), (3, 3, 30, 37), (2, 3, 16, 16)):
            x = torch.randn(shape)
            assert torch.equal(kept(x), released(x))
            assert torch.equal(kept.forward_features(x), released.forward_features(x))
            for mine, theirs in zip(
                released.forward_intermediates(x, intermediates_only=True),
                kept.forward_intermediates(x, intermediates_only=True),
                strict=True,
            ):
                assert torch.equal(mine, theirs)
    assert released.explain(x).one_call
    assert [p.shape for p in released.parameters()] == [p.shape for p in kept.parameters()]


def test_half_precision(model):
    model = model.half()
    x = torch.randn(2, 3, 16, 16).half()
    with torch.no_grad():
        assert torch.equal(optimize(model)(x), optimize(model, release=True)(x))


@pytest.mark.parametrize(
    "use",
    [
        copy.deepcopy,
        pickle.dumps,
        lambda fast: fast.state_dict(),
        lambda fast: fast.load_state_dict({}, strict=False),
        lambda fast: fast.half(),
        lambda fast: fast.refresh() or fast(torch.randn(1, 3, 8, 8)),
        lambda fast: fast.stem(torch.randn(1, 3, 8, 8)),
        lambda fast: fast.blocks[0](torch.randn(1, 24, 8, 8)),
        lambda fast: _under_autocast(fast),
        lambda fast: _with_a_hook(fast),
    ],
)
def test_what_needs_them_says_so(model, use):
    fast = optimize(model, release=True)
    with (
        torch.no_grad(),
        pytest.raises(ReleasedWeightsError, match=r"has let go of; call optimize\(\) without rel"),
    ):
        use(fast)


def _under_autocast(fast):
    with torch.autocast("cpu", torch.bfloat16):
        fast(torch.randn(1, 3, 8, 8))


def _with_a_hook(fast):
    fast.blocks[1].register_forward_hook(lambda *_: None)
    fast(torch.randn(1, 3, 8, 8))


def test_the_memory_is_gone(model):
    fast = optimize(model)
    memory = [weakref.ref(p.untyped_storage()) for p in fast.blocks.parameters()]
    fast.release()
    gc.collect()
    assert all(reference() is None for reference in memory)
    held = sum(p.untyped_storage().nbytes() for p in fast.blocks.parameters())
    assert held <= 8 * len(list(fast.blocks.parameters()))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda m: optimize(m, backend="reference", release=True), "has no call for all layers"),
        (lambda m: optimize(m.double(), release=True), "has no call for all layers"),
        (
            lambda _: optimize(VARIANTS["squeeze-excite-after"].model(), release=True),
            "modules of the source's own",
        ),
    ],
)
def test_where_it_is_not_for(model, make, why):
    with pytest.raises(BackendUnavailableError, match=f"cannot be released: .*{why}"):
        make(model)


@pytest.mark.exhaustive
def test_memory_of_the_process():
    """The published 1024 x 20: the weights once, and little else."""
    code = """
import ctypes, gc, torch, convmixer_fast
import torch._dynamo, torch.export
def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
tiny = convmixer_fast.optimize(convmixer_fast.ConvMixer(8, 1, kernel_size=3, patch_size=4).eval())
tiny(torch.zeros(1, 3, 8, 8))
before = resident()
model = convmixer_fast.ConvMixer(1024, 20, kernel_size=9, patch_size=14).eval()
fast = convmixer_fast.optimize(model, release=True)
del model
with torch.inference_mode():
    fast(torch.randn(1, 3, 224, 224))
print(resident() - before, sum(p.numel() for p in fast.parameters()) * 4 / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, weights = map(float, done.stdout.split())
    print(f"{grown:.0f} MiB for {weights:.0f} MiB of weights")
    assert grown < 1.5 * weights + 8
