"""load(): every file and naming that users have, and none that runs code."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from convmixer_fast import CheckpointError, ConvMixer, load
from convmixer_fast.models.randomize import randomize
from tests.timm_models import timm_model
from tests.zoo import Labml, locuslab, tweetable

BUILDERS = {
    "ours": lambda: ConvMixer(16, 3, kernel_size=5, patch_size=4, num_classes=10),
    "locuslab": lambda: locuslab(16, 3, 5, 4),
    "tweetable": lambda: tweetable(16, 3, 5, 4, 10),
    "labml": lambda: Labml(16, 3, 5),
    "no-bias": lambda: locuslab(16, 3, 5, 4, bias=False),
    "no-affine": lambda: locuslab(16, 3, 5, 4, norm=lambda c: nn.BatchNorm2d(c, affine=False)),
    "no-classifier": lambda: ConvMixer(16, 3, kernel_size=5, patch_size=4, num_classes=0),
    "two-features-a-channel": lambda: ConvMixer(
        16, 3, kernel_size=5, patch_size=4, num_classes=4, global_pool="catavgmax"
    ),
    "grey": lambda: ConvMixer(16, 3, kernel_size=5, patch_size=4, num_classes=2, in_chans=1),
}


def same(loaded, source, channels=3):
    x = torch.randn(2, channels, 21, 26)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), source(x))


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize("name", BUILDERS)
def test_names_and_files(tmp_path, name, suffix):
    source = randomize(BUILDERS[name]())
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    loaded = load(path, activation="gelu")
    assert not loaded.training
    same(loaded, source, loaded.in_chans)


@pytest.mark.timm
def test_a_published_architecture_is_known_to_use_relu(tmp_path):
    source = randomize(timm_model("convmixer_768_32"))
    path = tmp_path / "convmixer_768_32_ks7_p7_relu.pth.tar"
    torch.save(source.state_dict(), path)
    same(load(path), source)


def test_activation_in_the_metadata(tmp_path):
    source = randomize(ConvMixer(16, 2, kernel_size=3, patch_size=4, act_layer=nn.ReLU))
    path = tmp_path / "model.safetensors"
    save_file(source.state_dict(), path, metadata={"activation": "relu"})
    same(load(path), source)
    save_file(source.state_dict(), path, metadata={"activation": "swish"})
    with pytest.raises(CheckpointError, match="metadata names an unknown activation 'swish'"):
        load(path)


@pytest.fixture
def source():
    return randomize(BUILDERS["ours"]())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


def test_activation_is_asked_for(source, path):
    torch.save(source.state_dict(), path)
    with pytest.raises(ValueError, match=r"activation of .*\(dim 16, depth 3.*pass activation="):
        load(path)
    with pytest.raises(ValueError, match="activation must be one of 'gelu'.*got 'mish'"):
        load(path, activation="mish")


def test_other_pooling(source, path):
    source.global_pool.pool_type = "max"
    torch.save(source.state_dict(), path)
    same(load(path, activation="gelu", global_pool="max"), source)
    with pytest.raises(ValueError, match="global_pool must be one of"):
        load(path, activation="gelu", global_pool="mean")


@pytest.mark.parametrize("container", ["state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_training_checkpoints(source, path, container, prefix):
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    options = argparse.Namespace(lr=0.01, model="convmixer")
    torch.save({"epoch": 3, "args": options, "optimizer": {}, container: state}, path)
    same(load(path, activation="gelu"), source)


def test_ema_weights_are_preferred(source, path):
    other = randomize(BUILDERS["ours"](), seed=9)
    torch.save({"state_dict": other.state_dict(), "state_dict_ema": source.state_dict()}, path)
    same(load(path, activation="gelu"), source)


def test_legacy_format(source, path):
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
    same(load(path, activation="gelu"), source)


def test_dtype_of_the_file_is_kept(source, path):
    torch.save(source.half().state_dict(), path)
    assert load(path, activation="gelu").stem[0].weight.dtype == torch.float16


class Malicious:
    ran = False

    def __reduce__(self):
        return (setattr, (Malicious, "ran", True))


@pytest.mark.parametrize("form", ["torch.save", "plain pickle", "whole module"])
def test_code_in_a_pickle_is_not_run(source, path, form):
    if form == "torch.save":
        torch.save({"state_dict": source.state_dict(), "extra": Malicious()}, path)
    elif form == "whole module":
        torch.save(source, path)
    else:
        path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="refused: .*could run code.*state_dict"):
        load(path, activation="gelu")
    assert not Malicious.ran


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 0.3, 0.99])
def test_truncated(source, tmp_path, suffix, kept):
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    size = path.stat().st_size
    os.truncate(path, int(size * kept) if isinstance(kept, float) else kept)
    with pytest.raises(CheckpointError, match=r"model\.(pth|safetensors): (not a whole|refused)"):
        load(path, activation="gelu")


def _without(name):
    def change(state):
        del state[name]

    return change


def _renamed(old, new):
    def change(state):
        state[new] = state.pop(old)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("stem.0.weight"), "stem.0.weight is missing"),
        (_without("blocks.1.0.fn.0.weight"), "not the weights of a ConvMixer.*blocks.1.0.fn.0"),
        (_without("blocks.1.0.fn.0.bias"), "not the weights of a ConvMixer.*blocks.1.0.fn.0.bias"),
        (_without("stem.2.running_mean"), "not the weights of a ConvMixer.*running_mean"),
        (_renamed("head.weight", "classifier.weight"), "1 of .* do not belong.*classifier.weight"),
        (lambda s: s.update({"stem.0.weight": torch.zeros(16, 3)}), "expected 4 dimensions"),
        (lambda s: s.update({"stem.0.weight": torch.zeros(16, 3, 4, 2)}), "square patches"),
        (
            lambda s: s.update({"blocks.2.1.weight": torch.zeros(16, 8, 1, 1)}),
            "not the weights of a ConvMixer.*size mismatch",
        ),
    ],
)
def test_what_is_no_convmixer(source, path, change, message):
    state = source.state_dict()
    change(state)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=message):
        load(path, activation="gelu")


def test_two_names_of_one_tensor(path):
    state = locuslab(8, 1, 3, 2).state_dict()
    state["7.weight"] = state["6.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="several of its tensors have one meaning"):
        load(path, activation="gelu")


def test_integer_weights(source, path):
    torch.save({name: t.to(torch.int8) for name, t in source.state_dict().items()}, path)
    with pytest.raises(CheckpointError, match=r"floating-point weights, found torch\.int8"):
        load(path, activation="gelu")


def test_missing_layers(source, path):
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("blocks.1.")}
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"expected layers 0, 1, 2.*found \[0, 2\]"):
        load(path, activation="gelu")


def test_another_network(path):
    torch.save(nn.Linear(3, 4).state_dict(), path)
    with pytest.raises(CheckpointError, match="not a ConvMixer's tensors: expected the names of"):
        load(path)


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, torch.zeros(3)])
def test_no_tensors(path, content):
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="expected a state_dict of tensors, found"):
        load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file at .*gone.pth"):
        load(tmp_path / "gone.pth")
