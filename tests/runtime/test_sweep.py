"""The sweep over tiles, in Triton's interpreter or on a device, on tiny shapes."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from convmixer_fast.benchmarks.gpu.candidates import published_problems
from convmixer_fast.kernels import depthwise_block
from convmixer_fast.kernels.candidates import depthwise_candidates, pointwise_candidates
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile
from convmixer_fast.kernels.tuned import Problem, Tuned
from convmixer_fast.runtime import sweep as sweeps
from convmixer_fast.runtime.sweep import sweep

pytestmark = pytest.mark.device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEPTHWISE = Problem("depthwise_block", 2, 2, 8, 8, 3, "relu", "float16")
POINTWISE = Problem("pointwise_block", 16, 8, 4, 4, 1, "gelu", "float16")


def test_depthwise_sweep(monkeypatch):
    tiles = [ToeplitzTile(16, 4), ToeplitzTile(8, 2)]
    monkeypatch.setattr(sweeps, "depthwise_candidates", lambda size, dtype: tiles)
    said = []
    found = sweep(DEPTHWISE, 2, DEVICE, 0, said.append)
    assert set(found.seconds) == {found.present, *tiles}
    assert found.refused == {}
    assert list(found.seconds.values()) == sorted(found.seconds.values())
    assert said[-1] == f"depthwise_block {len(said)}/{len(said)}: {tiles[-1]}"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pointwise_sweep_names_what_fails(monkeypatch, dtype):
    tiles = [PointerTile(32, 32, 16, 4, 1), PointerTile(33, 32, 16, 4, 1)]
    monkeypatch.setattr(sweeps, "pointwise_candidates", lambda dtype, tma: tiles)
    found = sweep(POINTWISE._replace(dtype=dtype), 1, DEVICE, 0)
    assert set(found.seconds) == {found.present, tiles[0]}
    assert list(found.refused) == [tiles[1]]


class Nothing:
    def run(self):
        pass


class Silent:
    def run(self):
        raise AssertionError


@pytest.mark.parametrize(("launch", "why"), [(Nothing, "wrong: "), (Silent, "AssertionError: ")])
def test_what_writes_nothing_is_refused(monkeypatch, launch, why):
    tile = ToeplitzTile(16, 2)
    monkeypatch.setattr(sweeps, "depthwise_candidates", lambda size, dtype: [tile])
    real = depthwise_block.depthwise_launch
    monkeypatch.setattr(
        depthwise_block,
        "depthwise_launch",
        lambda *args: launch() if args[-1] == tile else real(*args),
    )
    assert sweep(DEPTHWISE, 2, DEVICE, 0).refused[tile].startswith(why)


@pytest.mark.cuda
@pytest.mark.parametrize("problem", [*published_problems("float16")][:2], ids=lambda p: p.op)
def test_real_candidates_on_a_device(monkeypatch, problem):
    """The first few: all of them take minutes to compile, and are a step of ``make gpu-first``."""
    for name in ("depthwise_candidates", "pointwise_candidates"):
        real = getattr(sweeps, name)
        monkeypatch.setattr(sweeps, name, lambda *args, real=real: itertools.islice(real(*args), 4))
    found = sweep(problem, 2, DEVICE, 0)
    assert len(found.seconds) > 3, found.refused


@pytest.mark.parametrize("image", [0, 2])
def test_a_wrong_candidate_is_not_timed(monkeypatch, image):
    tile = ToeplitzTile(16, 2)
    monkeypatch.setattr(sweeps, "depthwise_candidates", lambda size, dtype: [tile])
    real = depthwise_block.depthwise_launch

    def launch(x, weight, epilogue, out, residual, chosen):
        made = real(x, weight, epilogue, out, residual, chosen)
        return Wrong(made, image) if chosen == tile else made

    monkeypatch.setattr(depthwise_block, "depthwise_launch", launch)
    found = sweep(DEPTHWISE, 3, DEVICE, 0)
    assert found.refused[tile].startswith("wrong: relative error")
    assert tile not in found.seconds


def test_the_tables_tile_must_be_right(monkeypatch):
    real = depthwise_block.depthwise_launch
    monkeypatch.setattr(depthwise_block, "depthwise_launch", lambda *args: Wrong(real(*args), 0))
    with pytest.raises(RuntimeError, match=r"the present tile .* fails: wrong"):
        sweep(DEPTHWISE, 1, DEVICE, 0)


class Wrong:
    """A launch that spoils one number of an image."""

    def __init__(self, launch, image):
        self.launch, self.image = launch, image

    def run(self):
        self.launch.run()
        self.launch.out[self.image, 0, 0, 0] += 5


def test_candidates():
    for size in (3, 9, 11, 15, 17):
        tiles = list(depthwise_candidates(size, torch.float16))
        assert len(tiles) == len(set(tiles))
        assert any(isinstance(tile, ToeplitzTile) for tile in tiles) == (size <= 15)
    assert not any(
        isinstance(tile, ToeplitzTile) for tile in depthwise_candidates(7, torch.float32)
    )
    for tma, kind in ((True, TmaTile), (False, PointerTile)):
        tiles = list(pointwise_candidates(torch.float16, tma))
        assert len(tiles) == len(set(tiles)) > 8
        assert all(isinstance(tile, kind) for tile in tiles)


def test_tuned_is_plain_data():
    tuned = Tuned(3, {DEPTHWISE: ToeplitzTile(16, 4), POINTWISE: TmaTile(64, 64, 64, False, 4, 3)})
    assert Tuned.from_json(tuned.to_json()) == tuned
