"""The sweep over tiles, in Triton's interpreter or on a device, on tiny shapes."""

import pytest
import torch

pytest.importorskip("triton")

from typer.testing import CliRunner

from convmixer_fast.benchmarks import tune as sweeps
from convmixer_fast.benchmarks.__main__ import app
from convmixer_fast.benchmarks.tune import Problem, published_problems, tune
from convmixer_fast.kernels.candidates import depthwise_candidates, pointwise_candidates
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile

pytestmark = pytest.mark.device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.float16


def test_depthwise_sweep_prints_a_row(monkeypatch):
    tiles = [ToeplitzTile(16, 4), ToeplitzTile(8, 2)]
    monkeypatch.setattr(sweeps, "depthwise_candidates", lambda size: tiles)
    sweep = tune(Problem("depthwise_block", 2, 8, 2, "relu", 3), DEVICE, HALF, 0)
    assert set(sweep.seconds) == {sweep.present, *tiles}
    assert sweep.refused == {}
    assert list(sweep.seconds.values()) == sorted(sweep.seconds.values())
    assert sweep.row().endswith(f"Config(3, 8, 8, 0, 4, {sweep.best!r}),")
    assert sweep.row().startswith("# depthwise_block: 2 x 8x8 k3 relu, batch 2: ")
    assert sweep.table().row_count == len(sweep.seconds)


def test_pointwise_sweep_names_what_fails(monkeypatch):
    tiles = [PointerTile(32, 32, 16, 4, 1), PointerTile(33, 32, 16, 4, 1)]
    monkeypatch.setattr(sweeps, "pointwise_candidates", lambda tma: tiles)
    sweep = tune(Problem("pointwise_block", 16, 4, 1), DEVICE, HALF, 0)
    assert set(sweep.seconds) == {sweep.present, tiles[0]}
    assert list(sweep.refused) == [tiles[1]]
    assert sweep.row().endswith(f'Config(_EVERY, "16-bit", True, 16, 0, {sweep.best!r}),')


def test_a_wrong_candidate_is_not_timed(monkeypatch):
    tile = ToeplitzTile(16, 2)
    monkeypatch.setattr(sweeps, "depthwise_candidates", lambda size: [tile])
    real = sweeps.launch_toeplitz

    def launch(*args):
        real(*args)
        if args[-1] == tile:
            args[3][0, 0, 0, 0] += 5

    monkeypatch.setattr(sweeps, "launch_toeplitz", launch)
    sweep = tune(Problem("depthwise_block", 2, 8, 2, "relu", 3), DEVICE, HALF, 0)
    assert sweep.refused[tile].startswith("wrong: relative error")
    assert tile not in sweep.seconds


def test_candidates():
    for size in (3, 9, 11, 15, 17):
        tiles = list(depthwise_candidates(size))
        assert len(tiles) == len(set(tiles))
        assert any(isinstance(tile, ToeplitzTile) for tile in tiles) == (size <= 15)
    for tma, kind in ((True, TmaTile), (False, PointerTile)):
        tiles = list(pointwise_candidates(tma))
        assert len(tiles) == len(set(tiles)) > 8
        assert all(isinstance(tile, kind) for tile in tiles)


def test_published_problems():
    assert [str(problem) for problem in published_problems(64)][:2] == [
        "depthwise_block: 768 x 32x32 k7 relu, batch 64",
        "pointwise_block: 768 x 32x32 relu, batch 64",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_command_needs_a_device():
    result = CliRunner().invoke(app, ["tune"])
    assert "tune needs a CUDA device" in str(result.exception)
