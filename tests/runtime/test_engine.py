"""When a FusedConvMixer runs its trunk in one call, and when what that was made from is stale."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

pytest.importorskip(
    "convmixer_fast._C",
    reason="needs the compiled extension: CONVMIXER_FAST_EXT=1 pip install .",
)

from convmixer_fast import InferenceOnlyError, optimize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import cpu, engine

ARCHITECTURE = Architecture(24, 2, 3, 2, "gelu", num_classes=5)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def optimized():
    model = randomize(ARCHITECTURE.build())
    return model, optimize(model, backend="cpu")


@pytest.fixture
def model(optimized):
    return copy.deepcopy(optimized[0])


@pytest.fixture
def fast(optimized):
    return copy.deepcopy(optimized[1])


@pytest.fixture
def made(monkeypatch):
    """How many trunks were made."""
    count = []
    original = cpu.CpuTrunk.__init__

    def init(self, *args):
        count.append(self)
        original(self, *args)

    monkeypatch.setattr(cpu.CpuTrunk, "__init__", init)
    return count


def by_ops(fast, x=X):
    """What the ops one by one compute from the module's present parameters."""
    with torch.no_grad():
        for block in (fast.stem, *(block for layer in fast.blocks for block in layer)):
            x = block(x)
        return fast.forward_head(x)


def check(fast, x=X):
    with torch.inference_mode():
        out = fast(x)
    assert relative_error(out, by_ops(fast, x)) < 1e-6
    return out


def test_the_trunk_is_made_once(fast, made):
    first = check(fast)
    assert torch.equal(check(fast), first)
    check(fast, X[:1, :, :6])
    with torch.no_grad():
        features = fast.forward_features(X)
    assert features.shape == (2, 24, 4, 4)
    assert relative_error(fast.forward_head(features), first) < 1e-6
    assert len(made) == 1


CHANGES = {
    "in-place": lambda fast: fast.blocks[0][1].weight.mul_(2),
    "in-place-vector": lambda fast: fast.blocks[1][0].shift.add_(1),
    "load_state_dict": lambda fast: fast.load_state_dict(
        {name: 1.25 * value for name, value in fast.state_dict().items()}
    ),
    "assigned": lambda fast: fast.load_state_dict(
        {name: 1.25 * value for name, value in fast.state_dict().items()}, assign=True
    ),
    "new-parameter": lambda fast: setattr(
        fast.stem, "weight", nn.Parameter(2 * fast.stem.weight, requires_grad=False)
    ),
    "data": lambda fast: setattr(fast.stem.weight, "data", 2 * fast.stem.weight),
    "head": lambda fast: fast.head.weight.mul_(2),
    "new-head": lambda fast: fast.reset_classifier(5),
    "pool-type": lambda fast: setattr(fast.global_pool, "pool_type", "max"),
    "other-pool": lambda fast: fast.reset_classifier(5, "max"),
    "no-shift": lambda fast: setattr(fast.blocks[0][0], "shift", None),
    "activation": lambda fast: setattr(fast.blocks[0][0], "activation", "relu"),
    "layers-swapped": lambda fast: fast.blocks.__setitem__(0, fast.blocks[1]),
    "layer-removed": lambda fast: fast.blocks.__delitem__(1),
}


@pytest.fixture(params=[False, True], ids=["look-first", "look-late"])
def look(request, monkeypatch):
    """Whether it is looked whether weights have changed after the call, as on a GPU."""
    monkeypatch.setattr(engine, "_looks_late", lambda x: request.param)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["grad", "inference"])
@pytest.mark.usefixtures("look")
def test_changed_weights_are_used(change, mode, fast):
    before = check(fast)
    with mode():
        change(fast)
    assert relative_error(check(fast), before) > 1e-3


def test_moved_weights_are_used(fast):
    check(fast)
    half = check(copy.deepcopy(fast).half().float())
    assert relative_error(half, check(fast)) > 1e-6
    with torch.inference_mode():
        fast.half()
        fast.float()
    check(fast)
    with torch.inference_mode():
        fast.stem.weight.mul_(2)  # an inference tensor: nothing counts its changes
    check(fast)


def test_copies_and_pickles_have_their_own(fast, made):
    expected = check(fast)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(check(other), expected)
        with torch.no_grad():
            other.stem.weight.mul_(2)
        assert relative_error(check(other), expected) > 1e-3
        assert torch.equal(check(fast), expected)
    assert "_engine" not in "".join(fast.state_dict())


@pytest.mark.parametrize(
    "where", ["blocks", "blocks.1", "blocks.0.1", "stem", "global_pool", "head_drop", "head"]
)
def test_hooks_are_called(where, fast, made):
    check(fast)
    seen = []
    handle = fast.get_submodule(where).register_forward_hook(lambda *args: seen.append(args))
    with torch.inference_mode():
        out = fast(X)
    assert len(seen) == 1
    handle.remove()
    assert relative_error(check(fast), out) < 1e-6
    assert len(seen) == 1


def test_a_foreign_module_in_the_trunk_is_called(fast):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    fast.blocks[1] = Twice()
    with torch.inference_mode():
        expected = fast.forward_head(Twice()(fast.blocks[0](fast.stem(X))))
        assert relative_error(fast(X), expected) < 1e-6


def test_gradients_are_refused_as_by_the_ops(fast):
    check(fast)
    fast.blocks[0][0].weight.requires_grad_(True)
    with pytest.raises(InferenceOnlyError, match="depthwise_block has no backward pass"):
        fast(X)
    check(fast)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(3, 8, 8), ValueError, "x must be \\(N, C, H, W\\)"),
        (torch.ones(1, 4, 8, 8), ValueError, "x must have 3 channels"),
        (torch.ones(1, 3, 1, 8), ValueError, "smaller than one patch"),
        (torch.ones(1, 3, 8, 8, dtype=torch.float64), TypeError, "one dtype"),
    ],
)
def test_bad_input_is_refused_as_by_the_ops(x, error, message, fast):
    check(fast)
    with pytest.raises(error, match=message), torch.inference_mode():
        fast(x)


def test_modes_that_look_at_operations_see_them(fast):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    check(fast)
    with torch.no_grad(), Names() as mode:
        fast(X)
    assert sum("pointwise_block" in name for name in mode.names) == 2
    with torch.no_grad(), FlopCounterMode(display=False):
        fast(X)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(X).dtype == torch.bfloat16
    out = torch.func.functional_call(
        fast, {name: 2 * value for name, value in fast.state_dict().items()}, (X,)
    )
    assert relative_error(out, check(fast)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_does_not_matter(dtype, fast):
    expected, fresh = check(fast), copy.deepcopy(fast)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.inference_mode():
            outs = fast(X), fresh(X)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(out, expected) for out in outs)


def test_the_default_device_does_not_matter(fast):
    expected, fresh = check(fast), copy.deepcopy(fast)
    with torch.inference_mode(), torch.device("meta"):
        outs = fast(X), fresh(X)
    assert all(relative_error(out, expected) < 1e-6 for out in outs)


MISFITS = {
    "head-of-another-width": lambda fast: setattr(fast, "head", nn.Linear(23, 5)),
    "head-of-another-dtype": lambda fast: fast.head.double(),
    "head-elsewhere": lambda fast: fast.head.to("meta"),
    "layer-of-another-dtype": lambda fast: fast.blocks[1].half(),
    "fewer-channels": lambda fast: setattr(
        fast.blocks[0][1], "weight", nn.Parameter(torch.ones(23, 24, 1, 1), requires_grad=False)
    ),
    "short-vector": lambda fast: setattr(
        fast.blocks[0][1], "bias", nn.Parameter(torch.ones(23), requires_grad=False)
    ),
    "oblong-kernel": lambda fast: setattr(
        fast.blocks[0][0], "weight", nn.Parameter(torch.ones(24, 1, 3, 5), requires_grad=False)
    ),
    "even-kernel": lambda fast: setattr(
        fast.blocks[0][0], "weight", nn.Parameter(torch.ones(24, 1, 4, 4), requires_grad=False)
    ),
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("before", [True, False], ids=["made", "fresh"])
@pytest.mark.usefixtures("look")
def test_weights_that_do_not_fit_are_refused(change, before, fast):
    if before:
        check(fast)
    change(fast)
    with pytest.raises((ValueError, TypeError, RuntimeError)), torch.no_grad():
        fast(X)


def test_a_depthwise_block_shared_by_different_layers(fast):
    fast.blocks[1][0] = fast.blocks[0][0]
    check(fast)


def test_memory_that_is_used_again_is_noticed(fast):
    check(fast)
    shape = fast.head.weight.shape
    for _ in range(20):
        fast.head.weight.data = torch.randn(shape)
        check(fast)
        fast.head.weight.data = torch.randn(shape)
        fast.head.weight.data = torch.randn(shape)
        check(fast)


def test_global_hooks_and_wrapped_forwards_are_called(fast):
    check(fast)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[0]))
    try:
        with torch.inference_mode():
            fast(X)
    finally:
        handle.remove()
    assert fast.blocks[1][1] in seen
    block = fast.blocks[0][1]
    original = block.forward
    block.forward = lambda x: 2 * original(x)
    check(fast)


def test_other_backends_have_no_trunk(model, made):
    with torch.inference_mode():
        optimize(model, backend="reference")(X)
    assert not made


@pytest.mark.parametrize("pool", ["max", "avgmax", "catavgmax", ""])
def test_other_heads(pool, made):
    model = randomize(Architecture(24, 2, 3, 2, "gelu", num_classes=0, global_pool=pool).build())
    with torch.inference_mode():
        assert relative_error(optimize(model, backend="cpu")(X), model(X)) < 2e-6
    assert len(made) == 1


def test_shared_layers_are_packed_once():
    model = randomize(Architecture(24, 1, 3, 2, "gelu").build())
    model.blocks.append(model.blocks[0])
    fast = optimize(model, backend="cpu")
    with torch.inference_mode():
        assert relative_error(fast(X), model(X)) < 2e-6
        trunk = fast._engine._ready(fast, X).trunk
    packed = {id(part) for part in trunk._packed}
    assert len(trunk._packed) == 6
    assert len(packed) == 4


def test_python_threads_share_it(fast):
    expected = check(fast)
    wrong = []

    def run():
        for _ in range(20):
            with torch.inference_mode():
                if not torch.equal(fast(X), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_thread_may_export_meanwhile(fast, model):
    """PyTorch's flag for that is one for all threads; who serves keeps its one call."""
    expected = check(fast)
    seen, wrong, done = [], [], threading.Event()

    def serve():
        with torch.inference_mode():
            while not done.is_set():
                seen.append(torch.compiler.is_compiling())
                if not torch.equal(fast(X), expected) or not fast.explain(X).one_call:
                    wrong.append(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        while not sum(seen):
            with torch.no_grad():
                torch.export.export(model, (X,))
    finally:
        done.set()
        thread.join()
    assert not wrong
