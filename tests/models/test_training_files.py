"""What training scripts really write: containers, prefixes, other tensors; and what is no file."""

import argparse
import logging
import pathlib
import resource
import struct
import subprocess
import sys
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from convmixer_fast import CheckpointError, ConvMixer, load
from convmixer_fast.models.randomize import randomize
from tests.zoo import Labml, locuslab, tweetable


@pytest.fixture
def source():
    return randomize(ConvMixer(16, 3, kernel_size=5, patch_size=4, num_classes=10))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


def same(path, source):
    loaded = load(path, activation="gelu")
    x = torch.randn(2, 3, 21, 26)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), source(x))
    return loaded


def prefixed(prefix, source):
    return OrderedDict((prefix + name, value) for name, value in source.state_dict().items())


@pytest.mark.parametrize("loss", [0.25, torch.tensor(0.25), np.float64(0.25), np.zeros(3)])
def test_a_scripts_own_container(source, path, loss):
    optimizer = torch.optim.AdamW(source.parameters())
    source(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "epoch": 7,
            "model_state_dict": source.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": loss,
            "args": argparse.Namespace(output=pathlib.Path("runs"), history=defaultdict(list)),
        },
        path,
    )
    same(path, source)


@pytest.mark.parametrize(
    "keys", [("network",), ("a", "b", "generator"), ("checkpoint", "model_state_dict")]
)
def test_containers_of_any_name(source, path, keys):
    content = source.state_dict()
    for key in reversed(keys):
        content = {"step": 3, key: content, "scheduler": {"last_epoch": 3}}
    torch.save(content, path)
    same(path, source)


@pytest.mark.parametrize("ema", ["ema_state_dict", "model_ema", "state_dict_ema"])
def test_averages_are_preferred_wherever_they_stand(source, path, ema):
    other = randomize(ConvMixer(16, 3, kernel_size=5, patch_size=4, num_classes=10), seed=9)
    torch.save({"model": other.state_dict(), "extra": {}, ema: source.state_dict()}, path)
    same(path, source)


def test_averaged_models(source, path, caplog):
    averaged = torch.optim.swa_utils.AveragedModel(source)
    torch.save(averaged.state_dict(), path)
    same(path, source)
    assert not caplog.records, "n_averaged is nobody's weight"


@pytest.mark.parametrize("prefix", ["net.", "backbone.", "module.model.", "student._orig_mod."])
@pytest.mark.parametrize(
    "build",
    [
        lambda: ConvMixer(16, 3, kernel_size=5, patch_size=4, num_classes=10),
        lambda: locuslab(16, 3, 5, 4),
        lambda: tweetable(16, 3, 5, 4, 10),
        lambda: Labml(16, 3, 5),
    ],
    ids=["ours", "locuslab", "tweetable", "labml"],
)
def test_any_prefix(path, prefix, build, caplog):
    source = randomize(build())
    torch.save(prefixed(prefix, source) | {"criterion.weight": torch.ones(10)}, path)
    with caplog.at_level(logging.WARNING, "convmixer_fast"):
        same(path, source)
    assert f"ConvMixer behind {prefix!r}: criterion.weight" in caplog.text


def test_lightning(source, path, caplog):
    state = prefixed("model.", source) | {"criterion.weight": torch.ones(10)}
    content = {"epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.5.0"}
    content |= {"state_dict": state, "hyper_parameters": {"lr": 0.1}, "callbacks": {}}
    torch.save(content, path)
    same(path, source)
    assert "left out" in caplog.text


def test_profilers_buffers(source, path, caplog):
    for module in source.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    torch.save(source.state_dict(), path)
    same(path, source)
    assert not caplog.records


class Mmpretrain(nn.Module):
    """The names that mmpretrain's image classifier has."""

    def __init__(self):
        super().__init__()
        model = locuslab(16, 3, 5, 4)
        self.backbone = nn.Module()
        self.backbone.stem, self.backbone.stages = model[:3], nn.Sequential(*model[3:6])
        self.head = nn.Module()
        self.head.fc = model[-1]

    def forward(self, x):
        features = self.backbone.stages(self.backbone.stem(x))
        return self.head.fc(features.mean((2, 3)))


def test_mmpretrain(path, caplog):
    source = randomize(Mmpretrain())
    torch.save({"meta": {"epoch": 300}, "state_dict": source.state_dict()}, path)
    same(path, source)
    torch.save({"state_dict": prefixed("module.", source)}, path)
    same(path, source)
    assert not caplog.records


def test_a_head_of_two_layers_is_named(path):
    body = locuslab(8, 2, 3, 2)
    two = nn.Sequential(*body[:-1], nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.save(two.state_dict(), path)
    message = r"several of its tensors have one meaning: 7.weight and 9.weight; .*to optimize\(\)"
    with pytest.raises(CheckpointError, match=message):
        load(path, activation="gelu")
    model = ConvMixer(8, 2, kernel_size=3, patch_size=2, num_classes=3)
    model.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.save(prefixed("net.", model), path)
    message = (
        r"of those behind 'net\.', compared with timm's names, 4 of 39 do not belong: "
        r"net\.head\.\*\.weight \(2\), net\.head\.\*\.bias \(2\)\. Build the model in PyTorch"
    )
    with pytest.raises(CheckpointError, match=message):
        load(path, activation="gelu")


def test_other_networks_are_described(path):
    torch.save({f"encoder.{i}.attention.weight": torch.ones(2, 2) for i in range(12)}, path)
    with pytest.raises(CheckpointError, match=r"found encoder\.\*\.attention\.weight \(12\)"):
        load(path)


def _itself():
    content = {}
    content["state_dict"] = content
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_itself(), "without any"),
        ({1: torch.ones(2), (2, 3): torch.ones(2)}, "without any"),
        ({"state_dict": {0: torch.ones(3)}}, "without any"),
        ([{"a": torch.ones(3)}], "found list without any"),
    ],
)
def test_containers_that_are_none(path, content, message):
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize("content", [b".", b"", b"(.", b"\x80\x02}q\x00.", b"PK\x03\x04", b"]."])
def test_bytes_that_are_no_checkpoint(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pth: (not a whole|refused|expected)"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 20) + b'{"__metadata__": {} }'[:20],
        struct.pack("<Q", 2**63) + b"{}",
        b"",
    ],
)
def test_safetensors_without_tensors(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"found none|not a whole safetensors"):
        load(path)


_ABSURD = {
    "empty head": ("head.weight", lambda: torch.zeros(10**7, 0), r"\(10000000, 0\) is empty"),
    "empty kernel": ("blocks.0.0.fn.0.weight", lambda: torch.zeros(0, 0, 0, 5001), "is empty"),
    "expanded stem": (
        "stem.0.weight",
        lambda: torch.zeros(1).expand(10**7, 3, 4, 4),
        r"\(10000000, 3, 4, 4\) is larger than what the file holds",
    ),
    "sparse": ("head.weight", lambda: torch.ones(4, 4).to_sparse(), "expected a dense tensor"),
    "wide kernel": (
        "blocks.0.0.fn.0.weight",
        lambda: torch.zeros(1, 1, 1, 5001),
        "not the weights of a ConvMixer",
    ),
    "layer of that number": (
        "blocks.9999.1.weight",
        lambda: torch.zeros(1),
        "expected layers 0, 1, 2",
    ),
}


@pytest.mark.parametrize("name", _ABSURD)
def test_absurd_shapes_take_no_memory(source, path, name):
    tensor, make, message = _ABSURD[name]
    torch.save({**source.state_dict(), tensor: make()}, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        load(path, activation="gelu")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * 1024, f"{grown} KiB"


def test_memory_is_that_of_the_file(tmp_path):
    """A large model is never there twice."""
    path = tmp_path / "model.pth"
    model = ConvMixer(1024, 20, kernel_size=3, patch_size=4)
    torch.save(model.state_dict(), path)
    size = path.stat().st_size / 1024
    code = (
        "import resource, sys, convmixer_fast\n"
        "import numpy, torch\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = convmixer_fast.load(sys.argv[1], activation='gelu')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1.3 * size + 40 * 1024
