"""An optimized model is a module like any other: copies, dtypes, compilers, refusals."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from convmixer_fast import (
    ConvMixer,
    FusedConvMixer,
    InferenceOnlyError,
    UnsupportedModelError,
    ops,
    optimize,
)
from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.outputs import named_tensors
from convmixer_fast.models.randomize import randomize
from tests.module_cases import assert_same
from tests.variants import EVERY
from tests.zoo import VARIATIONS, Trunk


@pytest.fixture(scope="module")
def optimized():
    model = randomize(ConvMixer(24, 2, kernel_size=5, patch_size=4, num_classes=7))
    return model, optimize(model)


@pytest.fixture
def model(optimized):
    return copy.deepcopy(optimized[0])


@pytest.fixture
def fast(optimized):
    return copy.deepcopy(optimized[1])


@pytest.fixture
def x():
    return torch.randn(3, 3, 30, 37)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["optimize", "to", "source"])
def test_other_dtypes(model, x, dtype, how):
    if how == "optimize":
        fast = optimize(model, dtype=dtype)
    elif how == "to":
        fast = optimize(model).to(dtype)
    else:
        fast = optimize(copy.deepcopy(model).to(dtype))
    with torch.no_grad():
        out = fast(x.to(dtype))
        theirs = copy.deepcopy(model).to(dtype)(x.to(dtype))
        truth = copy.deepcopy(model).double()(x.to(dtype).double())
    assert out.dtype == dtype
    error, eager = relative_error(out, truth), relative_error(theirs, truth)
    # optimize().to(float64) keeps what float32 rounded away before.
    assert error <= (1e-6 if dtype == torch.float64 else 2 * eager)
    vectors = {p.dtype for p in fast.blocks.parameters() if p.dim() == 1}
    assert vectors == {torch.float64 if dtype == torch.float64 else torch.float32}


def test_float64_is_exact(model, x):
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        assert relative_error(optimize(model, dtype=torch.float64)(x.double()), truth) < 1e-14


def test_dtype_must_be_floating(model):
    with pytest.raises(TypeError, match=r"must be one of .*got torch\.int8"):
        optimize(model, dtype=torch.int8)


def test_modules_in_front_follow_the_dtype():
    model = VARIATIONS["normalized-in-front"].model()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        out = optimize(model, dtype=torch.bfloat16)(x.bfloat16())
        truth = copy.deepcopy(model).double()(x.bfloat16().double())
    assert out.dtype == torch.bfloat16
    assert relative_error(out, truth) < 2e-2


def test_torch_compile_fullgraph(fast, model, x):
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_same(compiled, model, x)
    assert_same(compiled, model, x[:, :, :20])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_torch_compile_inductor(fast, model, x):
    torch._dynamo.reset()
    assert_same(torch.compile(fast, fullgraph=True), model, x)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(fast, model, x, strict):
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    with torch.no_grad():
        program = torch.export.export(fast, (x,), dynamic_shapes=shapes, strict=strict)
    ops = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "convmixer_fast.depthwise_block.default" in ops
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert_same(loaded, model, x)
    assert_same(loaded, model, torch.randn(2, 3, 44, 52))


@pytest.mark.parametrize(
    "copier",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize(
    "name",
    [
        *("reference", "two-heads", "segmentation-head", "normalized-in-front", "shared-layers"),
        *("maps-in-a-list", "squeeze-excite-twice", "like-transformers"),
    ],
)
def test_copies(name, copier):
    variation = EVERY[name]
    fast = optimize(variation.model())
    twin = copier(fast)
    x = variation.image()
    with torch.no_grad():
        expected = named_tensors(fast(x))
        for parameter in fast.parameters():
            parameter.zero_()
        for (_, mine), (_, theirs) in zip(named_tensors(twin(x)), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_state_dict_round_trip(model, x):
    other = randomize(ConvMixer(24, 2, kernel_size=5, patch_size=4, num_classes=7), seed=5)
    fast = optimize(other)
    fast.load_state_dict(optimize(model).state_dict())
    assert_same(fast, model, x)


def test_takes_over_no_memory_of_the_source(model, x):
    fast = optimize(model)
    with torch.no_grad():
        before = fast(x)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(fast(x), before)


def test_shared_layers_stay_shared():
    fast = optimize(VARIATIONS["shared-layers"].model())
    assert len({id(layer) for layer in fast.blocks}) == 1


def test_idioms_for_device_and_size(fast):
    parameter = next(fast.parameters())
    assert parameter.device.type == "cpu"
    assert not any(p.requires_grad for p in fast.parameters())
    assert sum(p.numel() for p in fast.parameters()) > 1000
    assert not fast.training


def test_several_python_threads(fast, model):
    inputs = [torch.randn(2, 3, 20 + i, 24) for i in range(8)]
    with torch.no_grad():
        expected = [fast(x) for x in inputs]
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(fast(inputs[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_training_is_refused(fast, x):
    assert fast.train() is fast
    with pytest.raises(InferenceOnlyError, match="cannot be trained.*train the source model"):
        fast(x)
    assert fast.eval() is fast
    fast(x)


def test_a_parent_is_switched_as_a_whole(fast, x):
    parent = nn.Sequential(nn.Dropout(), fast, nn.Dropout()).train()
    assert [module.training for module in parent] == [True, True, True]
    parent.eval()
    assert not any(module.training for module in parent.modules())


def test_a_frozen_part_of_what_is_trained(model, x):
    frozen = optimize(model, in_training="stay")
    head = nn.Linear(7, 2)
    parent = nn.Sequential(frozen, head).train()
    assert parent.training
    assert not any(module.training for module in frozen.modules())
    loss = parent(x).square().sum()
    loss.backward()
    assert head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in frozen.parameters())
    again = pickle.loads(pickle.dumps(frozen)).train()
    assert not again.training
    with pytest.raises(ValueError, match="in_training must be one of 'raise', 'stay', got 'never'"):
        optimize(model, in_training="never")


def test_gradients_are_refused(fast, x):
    with pytest.raises(InferenceOnlyError, match="no backward pass.*detach the input"):
        fast(x.requires_grad_())
    with torch.no_grad():
        fast(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.randn(2, 4, 30, 30), ValueError, "x must have 3 channels.*got .2, 4, 30"),
        (lambda: torch.randn(3, 30, 30), ValueError, "x must be .N, C, H, W., got 3 dimensions"),
        (lambda: torch.ones(1, 3, 30, 30, dtype=torch.int64), TypeError, "got torch.int64"),
        (lambda: torch.ones(1, 3, 30, 30, dtype=torch.uint8), TypeError, "got torch.uint8"),
        (lambda: torch.randn(1, 3, 3, 30), ValueError, "smaller than one patch: it is 3 x 30"),
        (lambda: torch.randn(1, 3, 30, 30).half(), TypeError, "must have one dtype.*float16"),
        (lambda: torch.randn(1, 3, 30, 30, device="meta"), ValueError, "on one device, got meta"),
    ],
    ids=["channels", "3-D", "int64", "uint8", "tiny", "dtype", "device"],
)
def test_bad_input_is_named(fast, make, error, message):
    with torch.no_grad(), pytest.raises(error, match=message):
        fast(make())


def test_reset_classifier(fast, model, x):
    fast.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model.forward_head(model.forward_features(x), True))
    fast.reset_classifier(4, "catavgmax")
    assert fast(x).shape == (3, 4)
    assert fast.get_classifier().in_features == 48
    assert not fast(x).requires_grad


def test_methods_that_need_a_plain_head_say_so():
    fast = optimize(Trunk(lambda m, f, x: {"a": m.linear(f.mean((2, 3)))}).eval())
    x = torch.randn(1, 3, 16, 16)
    assert fast(x)["a"].shape == (1, 5)
    assert fast.forward_features(x).shape == (1, 24, 4, 4)
    for call in (
        lambda: fast.forward_head(fast.forward_features(x)),
        fast.get_classifier,
        lambda: fast.reset_classifier(3),
    ):
        with pytest.raises(UnsupportedModelError, match="needs a head of global pooling"):
            call()
    fast.reset_classifier(3, "avg")
    assert fast(x).shape == (1, 3)


def test_it_is_a_fused_convmixer(fast):
    assert isinstance(fast, FusedConvMixer)
    assert "DepthwiseBlock" in repr(fast)


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: _dual(f, x),
    ],
    ids=["jvp", "jacfwd", "dual"],
)
def test_forward_mode_gradients_are_refused(fast, x, differentiate):
    """They would be zeros."""
    with pytest.raises(InferenceOnlyError, match="no backward pass.*detach the input"):
        differentiate(fast, x)
    weight = torch.randn(3, 1, 3, 3)
    with pytest.raises(InferenceOnlyError, match="depthwise_block has no backward pass"):
        differentiate(lambda image: ops.depthwise_block(image, weight), x)


def _dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: x.to_sparse(), "sparse_coo"),
        (lambda x: x.to_mkldnn(), "mkldnn"),
        (lambda x: torch.nested.nested_tensor(list(x)), "nested"),
    ],
)
def test_tensors_of_other_kinds_are_refused(fast, x, make, kind):
    with torch.no_grad():
        with pytest.raises(TypeError, match=f"the input must be a dense tensor .*got a {kind} one"):
            fast(make(x))
        with pytest.raises(TypeError, match=f"depthwise_block: x must be a dense .* a {kind} one"):
            ops.depthwise_block(make(x), torch.randn(3, 1, 3, 3))


def test_what_is_to_be_negated_is(fast, model, x):
    """A view whose memory has the other sign, as the imaginary part of a conjugate is."""
    negated = torch._neg_view(x)
    assert negated.is_neg()
    assert_same(fast, model, negated)
    weight = torch.randn(3, 1, 3, 3)
    found = ops.depthwise_block(negated, weight, activation="relu")
    torch.testing.assert_close(found, ops.depthwise_block(-x, weight, activation="relu"))
