"""What is noticed of weights that change, and modules of inference tensors: on a CPU."""

import copy
import functools
import io
import pickle

import pytest
import torch

pytest.importorskip("convmixer_fast._C", reason="needs the compiled extension")

from convmixer_fast import _C, optimize
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@functools.cache
def _optimized(seed):
    model = randomize(Architecture(24, 2, 3, 2, "gelu", num_classes=5).build(), seed)
    return optimize(model, backend="cpu")


def make(seed=0):
    return copy.deepcopy(_optimized(seed))


@pytest.fixture
def fast():
    fast = make()
    with torch.inference_mode():
        fast(X)
    return fast


def logits(fast):
    with torch.inference_mode():
        return fast(X)


def from_anew(fast):
    """The same parameters in a module that has packed nothing yet."""
    with torch.no_grad():
        other = make(1)
        for mine, theirs in zip(other.parameters(), fast.parameters(), strict=True):
            mine.copy_(theirs)
    return logits(other)


@pytest.mark.parametrize("name", [name for name, _ in make().named_parameters()])
@pytest.mark.parametrize("how", ["data", "numpy"])
def test_writes_to_a_whole_tensor_past_pytorch_are_noticed(fast, name, how):
    parameter = fast.get_parameter(name)
    before = logits(fast)
    if how == "data":
        parameter.data.mul_(2)
        parameter.data.add_(0.5)
    else:
        parameter.detach().numpy()[...] = parameter.detach().numpy() * 2 + 0.5
    after = logits(fast)
    assert not torch.equal(after, before)
    assert torch.equal(after, from_anew(fast))


def test_refresh_is_for_the_others(fast):
    weight = fast.blocks[0][1].weight
    sampled = _sampled_positions(weight)
    untouched = next(i for i in range(weight.numel()) if i not in sampled)
    before = logits(fast)
    weight.data.view(-1)[untouched] += 1.0
    assert torch.equal(logits(fast), before), "documented: a single element is not noticed"
    fast.refresh()
    assert not torch.equal(logits(fast), before)
    assert torch.equal(logits(fast), from_anew(fast))


def _sampled_positions(tensor):
    from convmixer_fast.runtime.contents import _sampled

    return {(at - tensor.data_ptr()) // tensor.element_size() for at, _ in _sampled(tensor)}


def through_a_file(fast):
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_assigned_state(fast):
    other = make(1)
    other.load_state_dict({n: t.clone() for n, t in fast.state_dict().items()}, assign=True)
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda fast: pickle.loads(pickle.dumps(fast)),
    "torch.load": through_a_file,
    "to": lambda fast: copy.deepcopy(fast).to(torch.float64).to(torch.float32),
    "assign": with_assigned_state,
}


@pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)
def test_modules_of_inference_tensors_run_in_one_call(fast, copier):
    expected = logits(fast)
    with torch.inference_mode():
        twin = copier(fast)
        assert any(p.is_inference() for p in twin.parameters())
        assert twin.explain(X).one_call
        assert torch.equal(twin(X), expected)
        assert torch.equal(twin(X), expected)
        twin.head.bias.add_(1.0)  # not counted by PyTorch
        torch.testing.assert_close(twin(X), expected + 1)


def test_optimized_under_inference_mode_it_is_no_other():
    model = randomize(Architecture(24, 2, 3, 2, "gelu", num_classes=5).build())
    with torch.inference_mode():
        fast = optimize(model, backend="cpu")
        assert fast.explain(X).one_call
    assert torch.equal(logits(fast), logits(optimize(model, backend="cpu")))


def test_samples_compare_memory():
    tensor = torch.arange(6, dtype=torch.float64)
    sizes = [8, 8, 4, 1]
    addresses = [tensor.data_ptr(), tensor[3:].data_ptr(), tensor[5:].data_ptr() + 4]
    addresses.append(tensor[5:].data_ptr() + 3)
    samples = _C.Samples(addresses, sizes)
    assert samples.unchanged()
    tensor[1] = 7
    assert samples.unchanged(), "not one of them"
    tensor[3] = 7
    assert not samples.unchanged()
    tensor[3] = 3
    assert samples.unchanged()


@pytest.mark.parametrize(
    ("addresses", "sizes", "message"),
    [
        ([64], [], "addresses and sizes must be as many, got 1 and 0"),
        ([0], [4], "a sample has the address 0"),
        ([64], [9], "sizes must be at most 8, got 9"),
        ([64], [0], "sizes must be at least 1, got 0"),
    ],
)
def test_impossible_samples(addresses, sizes, message):
    with pytest.raises(ValueError, match=message):
        _C.Samples(addresses, sizes)
