"""optimize(): the same outputs as the source, and a module like any other."""

import copy
import io
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from convmixer_fast import (
    BackendUnavailableError,
    ConvMixer,
    FusedConvMixer,
    InferenceOnlyError,
    UnsupportedModelError,
    fold,
    optimize,
    recognize,
)
from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.published import PUBLISHED
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import backends
from tests.timm_models import timm_convmixer, timm_model
from tests.tolerances import TOL
from tests.zoo import VARIATIONS, Trunk

LIVE = [
    name
    for name in backends.BACKENDS
    if name != "triton" and backends.why_not(name, torch.device("cpu"), torch.float32) is None
]


def assert_every_backend_as_accurate(model, images):
    """Compare eager and every live backend with the float64 model, worst over all images.

    The worst of a few roundings is luck; many images make it a property.
    """
    folded = fold(recognize(model))
    candidates = {name: FusedConvMixer(folded, name) for name in LIVE}
    candidates["eager"] = model
    exact = copy.deepcopy(model).double()
    errors = {name: [] for name in candidates}
    with torch.inference_mode():
        for image in images:
            truth = exact(image.double())
            for name, candidate in candidates.items():
                errors[name].append(relative_error(candidate(image), truth))
    # Python's max() would pass over a NaN.
    worst = {name: torch.tensor(values).max().item() for name, values in errors.items()}
    for name in LIVE:
        assert worst[name] <= 2e-5, worst
        assert worst[name] <= 2 * worst["eager"], worst


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_compute_the_same(name):
    variation = VARIATIONS[name]
    assert_every_backend_as_accurate(variation.model(), map(variation.image, range(12)))


@pytest.mark.timm
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_compute_the_same(name):
    model = randomize(timm_model(name))
    images = [torch.randn(1, 3, 84, 99), torch.randn(2, 3, 56, 56)]
    assert_every_backend_as_accurate(model, images)


@pytest.mark.timm
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_timm_with_other_arguments(pool):
    model = randomize(
        timm_convmixer(
            24, 2, kernel_size=5, patch_size=3, in_chans=4, num_classes=5 if pool else 0,
            global_pool=pool, act_layer=nn.ReLU, drop_rate=0.2,
        )
    )  # fmt: skip
    fast = optimize(model)
    x = torch.randn(2, 4, 20, 17)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        features = model.forward_features(x)
        torch.testing.assert_close(fast.forward_features(x), features)
        for pre_logits in (False, True):
            torch.testing.assert_close(
                fast.forward_head(features, pre_logits=pre_logits),
                model.forward_head(features, pre_logits=pre_logits),
            )
        for options in ({}, {"indices": 1}, {"indices": [0], "stop_early": True}):
            ours = fast.forward_intermediates(x, **options)
            torch.testing.assert_close(ours, model.forward_intermediates(x, **options))
    assert fast.num_classes == model.num_classes
    assert fast.num_features == model.num_features
    assert fast.head_hidden_size == model.head_hidden_size


@pytest.mark.timm
def test_what_timm_reads_of_a_model_is_kept():
    model = timm_model("convmixer_1024_20_ks9_p14", num_classes=3)
    assert optimize(model).pretrained_cfg == model.pretrained_cfg


@pytest.fixture
def model():
    return randomize(ConvMixer(24, 2, kernel_size=5, patch_size=4, num_classes=7))


@pytest.fixture
def fast(model):
    return optimize(model)


@pytest.fixture
def x():
    return torch.randn(3, 3, 30, 37)


def assert_same(fast, model, x):
    with torch.no_grad():
        ours, theirs = fast(x), model(x)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    torch.testing.assert_close(ours, theirs, **TOL[torch.float32])


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (31, 64), (64, 31), (224, 224)])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_any_batch_and_size(fast, model, size, batch):
    assert_same(fast, model, torch.randn(batch, 3, *size))


def test_large_batch(fast, model):
    assert_same(fast, model, torch.randn(300, 3, 16, 16))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[..., ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: torch.cat((x, x), 1)[:, 2:5],
    ],
    ids=["channels-last", "strided", "transposed", "expanded", "slice-of-wider"],
)
def test_any_memory_format(fast, model, x, view):
    assert_same(fast, model, view(x))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(fast, model, x, mode):
    with mode():
        out = fast(x)
    assert not out.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(out.clone(), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(fast, model, dtype):
    x = torch.randn(32, 3, 30, 37)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        ours, theirs = fast(x), model(x)
    assert ours.dtype == theirs.dtype == dtype
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth)


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
    "name", ["reference", "two-heads", "segmentation-head", "normalized-in-front", "shared-layers"]
)
def test_copies(name, copier):
    variation = VARIATIONS[name]
    fast = optimize(variation.model())
    twin = copier(fast)
    x = variation.image()
    with torch.no_grad():
        expected = pytree.tree_leaves(fast(x))
        for parameter in fast.parameters():
            parameter.zero_()
        for mine, theirs in zip(pytree.tree_leaves(twin(x)), expected, strict=True):
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


def test_nan_stays_nan(fast, x):
    x[1, 0, 5, 5] = float("nan")
    with torch.no_grad():
        out = fast(x)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_training_is_refused(fast):
    with pytest.raises(InferenceOnlyError, match="cannot be trained.*train the source model"):
        fast.train()
    with pytest.raises(InferenceOnlyError, match="cannot be trained"):
        nn.Sequential(fast).train()
    assert fast.eval() is fast


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


def test_an_optimized_model_is_not_optimized_again(fast):
    with pytest.raises(UnsupportedModelError, match="is optimized already"):
        optimize(fast)


def test_backend_names(model):
    with pytest.raises(ValueError, match="backend must be 'auto' or one of.*got 'gpu'"):
        optimize(model, backend="gpu")
    assert optimize(model, backend="reference").backend == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_named_backend_runs_or_raises(model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"'triton' cannot run.*(CUDA|installed)"):
        optimize(model, backend="triton")


def test_the_user_is_told_when_nothing_fast_is_live(model, monkeypatch):
    broken = replace(backends._BACKENDS["cpu"], why_not=lambda device: "not built")
    monkeypatch.setitem(backends._BACKENDS, "cpu", broken)
    with pytest.warns(RuntimeWarning, match="no fast backend.*plain PyTorch.*cpu: not built"):
        optimize(model)


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
