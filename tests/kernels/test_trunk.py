"""The trunk of the Triton backend: chunks, buffers, memory. In the interpreter or on a device."""

import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from convmixer_fast import fold, optimize, recognize
from convmixer_fast.kernels import TritonTrunk
from convmixer_fast.kernels.launch import BoundLaunch
from convmixer_fast.kernels.trunk import even_parts
from convmixer_fast.models.published import PUBLISHED, Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import backends
from tests.sweeps import sparse
from tests.tolerances import MODEL_TOL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = backends.why_not("triton", DEVICE, torch.float32)
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(REASON is not None, reason=f"needs Triton: {REASON}"),
]


def folded(architecture, dtype=torch.float32):
    return fold(recognize(randomize(architecture.build()).to(DEVICE)), dtype)


def trunk_of(folded, **options):
    return TritonTrunk(folded.stem, folded.layers, folded.head, **options)


@pytest.mark.parametrize(
    ("chunk", "result"),
    sparse(
        itertools.product((1, 2, 3, 4, 9), ("features", "mean", "logits")),
        lambda point: point in ((2, "features"), (2, "logits")),
    ),
)
def test_chunks_give_what_the_whole_batch_does(chunk, result):
    model = folded(Architecture(12, 2, 3, 3, "gelu", 2, 5))
    x = torch.randn(5, 2, 10, 13, device=DEVICE)
    whole = trunk_of(model)(x, result)
    trunk = trunk_of(model, chunk=chunk)
    for _ in range(2):  # bound launches, too
        torch.testing.assert_close(trunk(x, result), whole)
    # A crop's rows are not contiguous, and no other plan's.
    torch.testing.assert_close(
        trunk(x[:, :, :9, :12], result), trunk(x[:, :, :9, :12].clone(), result)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_same_bits_whatever_stands_beside(dtype):
    trunk = trunk_of(folded(Architecture(8, 1, 5, 4, "gelu", 3, 5), dtype))
    x = torch.randn(3, 3, 40, 12, device=DEVICE).to(dtype)
    first = trunk(x, "logits").clone()
    assert torch.equal(trunk(x, "logits"), first)
    others = torch.randn_like(x)
    others[1] = x[1]
    assert torch.equal(trunk(others, "logits")[1], first[1])


def test_no_images():
    trunk = trunk_of(folded(Architecture(8, 1, 3, 2, "relu", 3, 5)), chunk=2)
    x = torch.zeros(0, 3, 8, 8, device=DEVICE)
    assert trunk(x, "features").shape == (0, 8, 4, 4)
    assert trunk(x, "logits").shape == (0, 5)


def test_layers_of_other_widths():
    layers = [torch.nn.Conv2d(3, 8, 2, 2), torch.nn.ReLU(), torch.nn.BatchNorm2d(8)]
    for width, wider in ((8, 20), (20, 6)):
        layers += [
            Residual(torch.nn.Conv2d(width, width, 3, padding=1, groups=width), width),
            *(torch.nn.Conv2d(width, wider, 1), torch.nn.ReLU(), torch.nn.BatchNorm2d(wider)),
        ]
    model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = randomize(model.eval()).to(DEVICE)
    x = torch.randn(3, 3, 9, 8, device=DEVICE)
    fast = optimize(model, backend="triton", chunk=2)
    with torch.no_grad():
        for _ in range(2):
            expected = model(x)
            error = (fast(x) - expected).abs().max() / expected.abs().max()
            assert error <= MODEL_TOL[torch.float32]


class Residual(torch.nn.Module):
    def __init__(self, conv, width):
        super().__init__()
        self.conv, self.norm = conv, torch.nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(torch.relu(self.conv(x))) + x


@pytest.mark.parametrize(
    ("images", "chunk", "parts"),
    [
        (5, None, [5]),
        (5, 5, [5]),
        (5, 8, [5]),
        (6, 4, [3, 3]),
        (64, 11, [10, 11, 11, 10, 11, 11]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_parts_are_even(images, chunk, parts):
    assert even_parts(images, chunk) == parts


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors made inside, as long as they live."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key = storage._cdata
        if key in self._seen or storage.nbytes() == 0:
            return
        self._seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key, size):
        self._seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("chunk", [None, 2])
def test_memory_of_a_call(chunk, monkeypatch):
    """Asked for: at most 1.3 of weights and two activations of a chunk; here without weights."""
    model = folded(Architecture(64, 2, 3, 2, "relu", 3, 10))
    trunk = trunk_of(model, chunk=chunk)
    x = torch.randn(6, 3, 12, 12, device=DEVICE)
    # Only what the trunk itself holds: the interpreter keeps the arguments of its last launch.
    monkeypatch.setattr(BoundLaunch, "__call__", lambda self, x, out: None)
    activation = (chunk or 6) * 64 * 36 * 4
    with LiveBytes() as memory:
        trunk(x, "logits")  # now images and weights are known, and the plan is made
        memory.peak = before = memory.live
        trunk(x, "logits")
    taken = memory.peak - before
    print(f"{taken / activation:.2f} activations of a chunk")
    assert 2 * activation <= taken <= 1.3 * 2 * activation


@pytest.mark.cuda
@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_memory_on_a_device(name, chunk):
    model = folded(PUBLISHED[name], torch.float16)
    trunk = trunk_of(model, chunk=chunk)
    x = torch.randn(32, 3, 224, 224, device=DEVICE).half()
    for _ in range(2):
        trunk(x, "logits")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trunk(x, "logits")
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    side = 224 // PUBLISHED[name].patch_size
    activation = (chunk or 32) * PUBLISHED[name].dim * side**2 * 2
    print(f"{peak / activation:.2f} activations of a chunk")
    assert peak <= 1.3 * 2 * activation
