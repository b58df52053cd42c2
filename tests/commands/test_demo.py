import importlib.util
import io
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from convmixer_fast import ConvMixer, load, optimize
from convmixer_fast.commands import demo
from convmixer_fast.errors import MismatchError, MissingDependencyError
from convmixer_fast.models import digits
from convmixer_fast.models.checkpoint import read_checkpoint
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import backends
from convmixer_fast.support.timing import Timings, cuda_events, interleave
from tests.paths import DIGITS

has_images = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sklearn", "matplotlib")),
    reason="needs scikit-learn and matplotlib: pip install '.[demo]'",
)


class FakeClock:
    """A clock that only the callables it makes move on."""

    def __init__(self) -> None:
        self.time = 0.0
        self.calls: list[str] = []

    def measure(self, call: Callable[[], object]) -> float:
        start = self.time
        call()
        return self.time - start

    def takes(self, name: str, *seconds: float) -> Callable[[], None]:
        durations = itertools.cycle(seconds)

        def call() -> None:
            self.calls.append(name)
            self.time += next(durations)

        return call


def test_interleave_alternates_and_leaves_the_warmup_out():
    clock = FakeClock()
    candidates = {"a": clock.takes("a", 100, 3, 1, 2), "b": clock.takes("b", 100, 1, 1, 1)}
    timings = interleave(candidates, rounds=3, warmup=1, measure=clock.measure)
    assert clock.calls == ["a", "b"] * 4
    assert timings.seconds == {"a": (3, 1, 2), "b": (1, 1, 1)}
    assert timings.rounds == 3
    assert timings.medians == {"a": 2, "b": 1}
    assert timings.ratio("a", "b") == 2
    assert timings.spread == pytest.approx(2.6 / 1.4)


def test_interleave_wakes_a_candidate_after_a_pause(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr("time.sleep", lambda seconds: clock.calls.append(f"sleep {seconds}"))
    candidates = {"a": clock.takes("a", 2, 1), "b": clock.takes("b", 2, 2)}
    timings = interleave(candidates, rounds=2, warmup=0, pause_s=0.5, measure=clock.measure)
    assert clock.calls == ["sleep 0.5", "a", "a", "sleep 0.5", "b", "b"] * 2
    assert timings.seconds == {"a": (1, 1), "b": (2, 2)}


def test_interleave_does_not_wake_a_candidate_whose_calls_are_long(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    interleave({"a": clock.takes("a", 3)}, rounds=3, warmup=0, pause_s=0.5, measure=clock.measure)
    assert clock.calls == ["a"] * 4


@pytest.mark.parametrize(
    ("budget_s", "rounds", "expected"),
    [(0, None, 1), (9, None, 3), (10, None, 4), (10, 2, 2), (1, 9, 1)],
)
def test_interleave_ends_with_its_budget_or_rounds(budget_s, rounds, expected, monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr("time.perf_counter", lambda: clock.time)
    candidates = {"a": clock.takes("a", 1), "b": clock.takes("b", 2)}
    timings = interleave(candidates, rounds=rounds, budget_s=budget_s, measure=clock.measure)
    assert timings.rounds == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass rounds or budget_s"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"budget_s": -1}, "budget_s must not be negative, got -1"),
        ({"rounds": 1, "warmup": -1}, "warmup must not be negative, got -1"),
        ({"rounds": 1, "pause_s": -1}, "pause_s must not be negative, got -1"),
        ({"rounds": 2, "min_rounds": 3}, r"min_rounds must be from 1 to rounds \(2\), got 3"),
        ({"budget_s": 2, "min_rounds": 0}, "min_rounds must be from 1 to rounds"),
    ],
)
def test_interleave_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        interleave({"a": int}, **options)


def test_interleave_refuses_no_candidates():
    with pytest.raises(ValueError, match="candidates must not be empty"):
        interleave({}, rounds=1)


@pytest.mark.cuda
def test_interleave_waits_for_the_device():
    x = torch.randn(4096, 4096, device="cuda")
    timings = interleave({"matmul": lambda: x @ x}, rounds=5, measure=cuda_events(x.device))
    # No GPU does these 137 GFLOP in the time in which the call returns.
    assert timings.medians["matmul"] > 1e-4


def test_interleave_goes_on_to_its_least_rounds():
    clock = FakeClock()
    timings = interleave(
        {"a": clock.takes("a", 1)}, budget_s=0, min_rounds=3, measure=clock.measure
    )
    assert timings.rounds == 3


def test_quantiles_are_interpolated():
    timings = Timings({"a": (4.0, 1.0, 2.0, 3.0, 5.0)})
    assert [timings.quantile("a", q) for q in (0, 0.5, 0.8, 1)] == pytest.approx([1, 3, 4.2, 5])
    with pytest.raises(ValueError, match="q must be between 0 and 1, got 20"):
        timings.quantile("a", 20)


def test_packaged_file_is_small_and_says_how_to_use_it():
    assert DIGITS.stat().st_size < 500_000
    checkpoint = read_checkpoint(DIGITS)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}
    metadata = checkpoint.metadata
    assert metadata["activation"] == "gelu"
    assert json.loads(metadata["image_size"]) == 8
    assert json.loads(metadata["crop_pct"]) == 1
    assert json.loads(metadata["labels"]) == list("0123456789")
    assert len(json.loads(metadata["mean"])) == len(json.loads(metadata["std"])) == 1
    assert "train_digits.py" in metadata["training"]


@has_images
def test_split_is_disjoint_stratified_and_repeatable():
    training, held_out = digits.training_digits(), digits.held_out_digits()
    assert len(held_out.labels) >= 360
    # No two images of the data set are equal, so their bytes tell them apart.
    rows = [image.numpy().tobytes() for part in (training, held_out) for image in part.images]
    assert len(set(rows)) == len(rows) == 1797
    share = len(held_out.labels) / len(rows)
    counts = [part.labels.bincount(minlength=10) for part in (training, held_out)]
    assert (counts[1] - share * (counts[0] + counts[1])).abs().max() <= 1
    assert torch.equal(held_out.images, digits.held_out_digits().images)
    assert held_out.images.shape[1:] == (1, 8, 8)
    assert held_out.images.min() == 0
    assert held_out.images.max() == 1


@has_images
def test_packaged_model_is_accurate_before_and_after():
    scans, model = digits.held_out_digits(), load(DIGITS)
    metadata = read_checkpoint(DIGITS).metadata
    (mean,), (std,) = json.loads(metadata["mean"]), json.loads(metadata["std"])
    images = (scans.images - mean) / std
    with torch.inference_mode():
        expected, actual = model(images), optimize(model)(images)
    for logits in (expected, actual):
        assert scans.accuracy(logits) >= 0.97
    assert torch.equal(expected.argmax(1), actual.argmax(1))
    assert (expected - actual).abs().max() <= 2e-5 * expected.abs().max()


def _run(output: Path, budget_s: float) -> tuple[demo.DemoReport, str]:
    printed = io.StringIO()
    report = demo.run(output, budget_s=budget_s, console=Console(file=printed, width=200))
    with Image.open(output) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 1000
    assert report.digits.differing == report.photo.differing == 0
    assert min(report.accuracies) >= 0.97
    assert f"backend {report.backend}" in printed.getvalue()
    assert str(output) in printed.getvalue()
    return report, printed.getvalue()


@has_images
@pytest.mark.parametrize("extension", [True, False], ids=["as-installed", "no-extension"])
def test_demo_writes_its_picture(tmp_path, monkeypatch, extension):
    small = randomize(ConvMixer(24, 2, kernel_size=7, patch_size=7))
    monkeypatch.setattr(demo, "_random_large_model", lambda: small)
    if not extension:
        monkeypatch.setattr(backends, "_load_extension", lambda: (None, "was not built"))
    report, printed = _run(tmp_path / "new" / "demo.png", budget_s=0.05)
    assert len(report.timings) == 3
    if not extension:
        assert report.backend == "reference"
        assert "was not built" in printed


@has_images
@pytest.mark.slow
@pytest.mark.exhaustive
def test_full_demo(tmp_path):
    _run(tmp_path / "demo.png", budget_s=1)


@has_images
@pytest.mark.parametrize("module", ["sklearn.datasets", "matplotlib.figure"])
def test_demo_names_what_is_missing(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'convmixer-fast\[demo\]'"):
        demo.run(tmp_path / "demo.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("optimized", "message"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], "1 of 2 predictions differ"),
        ([[1.0, 2.0], [1.0, 2.0001]], r"by up to 5\.0e-05 of the largest"),
        ([[1.0, 2.0], [float("nan"), 2.0]], "predictions differ"),
        ([[1.0, 2.0], [1.0, float("inf")]], "by up to inf"),
    ],
    ids=["prediction", "logits", "nan", "inf"],
)
def test_differences_are_refused(optimized, message):
    original = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    demo.LogitsComparison(original, original + 1e-6).check("equal")
    with pytest.raises(MismatchError, match=message):
        demo.LogitsComparison(original, torch.tensor(optimized)).check("broken")
