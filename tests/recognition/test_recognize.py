"""What is read of a ConvMixer, and that the source module is left as it is."""

import copy

import pytest
import torch

from convmixer_fast import optimize, recognize
from convmixer_fast.models.published import PUBLISHED
from convmixer_fast.spec import Head
from tests.sweeps import sparse
from tests.timm_models import timm_model
from tests.variants import EVERY, ONE_OF_EACH_KIND
from tests.zoo import VARIATIONS


@pytest.mark.timm
@pytest.mark.parametrize("name", sparse(PUBLISHED, "convmixer_768_32".__eq__))
def test_reads_the_published_models(name):
    source = timm_model(name)
    spec = recognize(source)
    assert len(spec.layers) == len(source.blocks)
    assert spec.stem.weight.shape == source.stem[0].weight.shape
    assert spec.stem.activation == ("relu" if name == "convmixer_768_32" else "gelu")
    assert isinstance(spec.head, Head)
    assert spec.head.global_pool == "avg"
    assert spec.head.weight.shape == (1000, source.num_features)
    assert spec.conditions == ()
    assert spec.preprocess is None


@pytest.mark.parametrize("name", sparse(EVERY, ONE_OF_EACH_KIND.__contains__))
def test_leaves_the_source_alone(name):
    model = EVERY[name].model()
    before = copy.deepcopy(model.state_dict())
    modules = {n: (type(m), m.training, dict(vars(m))) for n, m in model.named_modules()}
    optimize(model, backend="reference")
    after = model.state_dict()
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    for n, m in model.named_modules():
        kind, training, attributes = modules[n]
        assert (type(m), m.training) == (kind, training)
        assert set(vars(m)) == set(attributes)


@pytest.mark.parametrize(
    ("pool", "classes"), [("avg", 7), ("max", 7), ("avgmax", 7), ("catavgmax", 7), ("avg", 0)]
)
def test_pooling_is_told_by_what_it_computes(pool, classes):
    name = {"avg": "reference", 7: ""}.get(pool, f"reference-{pool}")
    model = VARIATIONS["reference-no-classifier" if classes == 0 else name].model()
    head = recognize(model).head
    assert isinstance(head, Head)
    assert head.global_pool == pool
    assert (head.weight is None) == (classes == 0)
