"""What is recognised of people's own parts: activations, norms, layers, several maps, names."""

import pytest
import torch
from torch import nn

from convmixer_fast import UnsupportedModelError, optimize, recognize
from convmixer_fast.accuracy import relative_error
from convmixer_fast.models.randomize import randomize
from convmixer_fast.spec import Affine, BatchNorm, Head
from tests.recognition.before import same
from tests.variants import BY_HAND, VARIANTS, Function, Output, Pyramid, SqueezeExcite
from tests.zoo import locuslab


@pytest.mark.parametrize("name", BY_HAND)
def test_activations_by_hand_are_those_of_the_kernels(name):
    spec = recognize(VARIANTS[f"{name}-by-hand"].model())
    blocks = [spec.stem, *(b for layer in spec.layers for b in (layer.depthwise, layer.pointwise))]
    assert {block.activation for block in blocks} == {BY_HAND[name][0]}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: x * 0.5 * (1 + torch.erf(x / 1.4)),
        lambda x: x.clamp(min=0) + x.mean(),
        lambda x: x * torch.sigmoid(x.amax((2, 3), keepdim=True)),
        lambda x: torch.maximum(x, torch.full_like(x, 1e-3)),
        lambda x: torch.where(x > 0, x, 0.0101 * x),
    ],
    ids=["quick-gelu", "another-erf", "mean", "gate", "nearly-relu", "nearly-leaky"],
)
def test_what_only_resembles_an_activation(function):
    model = locuslab(8, 2, 3, 4, act=lambda: Function(function))
    message = r"stem \(1\): expected an activation \(ReLU, GELU ...\), found"
    with pytest.raises(UnsupportedModelError, match=message):
        recognize(randomize(model))


def test_the_message_names_the_activations():
    model = locuslab(8, 2, 3, 4, act=lambda: Function(lambda x: x * torch.sigmoid(1.702 * x)))
    message = "found mul operations that compute none of gelu, gelu_tanh, relu, "
    with pytest.raises(UnsupportedModelError, match=message):
        recognize(randomize(model))


def _silu_in_float32(x):
    return (x.float().sigmoid() * x.float()).to(x.dtype)


def test_half_precision_activations_by_hand_in_float32():
    model = randomize(locuslab(8, 2, 3, 4, act=lambda: Function(_silu_in_float32))).half()
    assert recognize(model).stem.activation == "silu"


def test_norms_in_their_order():
    layer = recognize(VARIANTS["layer-scale"].model()).layers[0]
    kinds = [type(norm) for norm in layer.depthwise.norms]
    assert kinds == [BatchNorm, Affine, Affine, Affine, Affine, Affine]
    layer = recognize(VARIANTS["batchnorm-before-activation"].model()).layers[0]
    assert [type(norm) for norm in layer.depthwise.inner] == [BatchNorm]
    assert layer.depthwise.norms == ()


@pytest.mark.parametrize("name", ["squeeze-excite-in-branch", "squeeze-excite-twice", "two-stages"])
def test_parts_of_the_sources_own_are_told(name, caplog):
    variation = VARIANTS[name]
    fast, x = optimize(variation.model()), variation.image()
    with torch.no_grad():
        fast(x)
    said = [record.message for record in caplog.records]
    assert any("has modules of the source's own, which PyTorch runs" in text for text in said)
    found = fast.explain(x)
    assert not found.one_call
    inside = [part for part in found.outside if part.startswith("blocks.")]
    assert all(part.endswith(("(1 convolution)", "(2 convolutions)")) for part in inside)
    wanted = {
        "squeeze-excite-in-branch": [f"blocks.{n}.0.branch (2 convolutions)" for n in range(3)],
        "two-stages": ["blocks.2.entry (1 convolution)"],
    }
    assert inside == wanted.get(name, inside)
    assert len(inside) == {"squeeze-excite-twice": 5}.get(name, len(inside))


def test_convolutions_of_a_head_are_told():
    fast = optimize(VARIANTS["decoder"].model())
    found = fast.explain(VARIANTS["decoder"].image())
    assert found.one_call
    assert found.outside == ("source_head (2 convolutions)",)


@pytest.mark.parametrize(
    ("name", "steps", "taps"),
    [
        ("maps-in-a-list", 4, (0, 1, 2, 3)),
        ("maps-in-a-dictionary", 3, (1,)),
        ("first-map", 1, ()),
        ("super-resolution", 3, (0,)),
    ],
)
def test_maps_of_several_depths(name, steps, taps):
    variation = VARIANTS[name]
    spec = recognize(variation.model())
    assert (len(spec.layers), spec.taps) == (steps, taps)
    assert optimize(variation.model()).explain(variation.image()).one_call


@pytest.mark.parametrize("head", [lambda maps: maps, lambda maps: maps[-1].mean((2, 3))])
def test_what_writes_into_a_map_too_early(head):
    """Whether the head is one of the source's own, or a plain one that does not see the writes."""

    class Early(Pyramid):
        def forward(self, x):
            maps = [self.body[:3](x)]
            for layer in self.body[3:6]:
                maps.append(layer(maps[-1]))
                maps[-1][:, 0] = 0
            maps.append(self.body[6](maps[-1]))
            return self.head(maps)

    with pytest.raises(UnsupportedModelError, match=r"nothing else writes into, found fill_"):
        recognize(randomize(Early(head)))


def test_a_layer_that_needs_more_than_the_one_before_is_the_heads():
    class Skips(nn.Module):
        """The third layer reads the stem's output too."""

        def __init__(self):
            super().__init__()
            self.body = locuslab(8, 3, 3, 4)

        def forward(self, x):
            stem = self.body[:3](x)
            return self.body[5:](self.body[3:5](stem) + stem)

    model = randomize(Skips())
    spec = recognize(model)
    assert len(spec.layers) == 2
    assert not isinstance(spec.head, Head)
    same(model)


def test_pooled_squeeze_excite_between_stem_and_layers():
    model = locuslab(8, 2, 3, 4)
    fast = same(nn.Sequential(*model[:3], SqueezeExcite(8), *model[3:]))
    assert [name for name, _ in fast.blocks[0].named_children()] == ["entry", "0", "1"]


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = locuslab(8, 2, 3, 4)

    def forward(self, images, scale=1.0):
        return self.model(images)


def test_the_image_has_the_sources_name():
    model, x = randomize(Named()), torch.randn(2, 3, 12, 12)
    fast = optimize(model)
    with torch.no_grad():
        assert torch.equal(fast(images=x), fast(x))
        assert torch.equal(fast(x=x), fast(x))
        for wrong in ({"picture": x}, {"images": x, "scale": 2.0}):
            with pytest.raises(TypeError, match="one batch of images, by position or as images=, "):
                fast(**wrong)
        with pytest.raises(TypeError, match="got x=, images="):
            fast(x, images=x)
        with pytest.raises(TypeError, match=r"expected a tensor \(N, C, H, W\), got NoneType"):
            fast()


def test_dataclasses_are_returned():
    variation = VARIANTS["like-transformers"]
    model, x = variation.model(), variation.image()
    fast = optimize(model)
    assert fast.input_name == "pixel_values"
    with torch.no_grad():
        mine, theirs = fast(pixel_values=x), model(pixel_values=x)
    assert type(mine) is Output
    assert relative_error(mine, theirs) < 2e-5
    assert len(mine.hidden_states) == 2


def _needs_two(m, x, y):
    return m.body(x) + y


def _by_values(m, x):
    return m.body(x) if x.mean() > 0 else -m.body(x)


def _three_dimensions(m, x):
    _c, _h, _w = x.shape
    return m.body(x[None])


def _no_method(m, x):
    return m.body(x.no_such_method())


def _of_one_size(m, x):
    return m.body(x) + x.reshape(2, 3, 50, 50).mean()


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = locuslab(8, 2, 3, 4)


@pytest.mark.parametrize(
    ("forward", "message", "example_helps"),
    [
        (_needs_two, r"found one of 2: x, y; pass a module that calls it with the others", False),
        (_by_values, r"takes a path by the values of the image", False),
        (_three_dimensions, r"takes a single image \(C, H, W\), such as \(3, 32, 36\)", False),
        (_no_method, r"no_such_method'\)$", False),
        (_of_one_size, r"of a particular size, pass example_input=", True),
    ],
)
def test_advice_fits(forward, message, example_helps):
    model = randomize(type("Model", (Called,), {"forward": forward})())
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        recognize(model)
    assert ("example_input" in str(caught.value)) == example_helps
