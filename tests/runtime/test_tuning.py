"""Choosing tiles and chunks for a network: in Triton's interpreter, or on a device."""

import copy
import io
import json
import logging
import pickle
import threading

import pytest
import torch

pytest.importorskip("triton")

import triton

from convmixer_fast import BackendUnavailableError, optimize
from convmixer_fast.kernels import trunk as trunks
from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.pointwise_pointers import PointerTile
from convmixer_fast.kernels.pointwise_tma import TmaTile
from convmixer_fast.kernels.tuned import Tuned, tuned_for
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import backends, tuning
from convmixer_fast.runtime import sweep as sweeps
from convmixer_fast.support import progress
from tests.sweeps import sparse
from tests.tolerances import MODEL_TOL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = backends.why_not("triton", DEVICE, torch.float32)
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(REASON is not None, reason=f"needs Triton: {REASON}"),
]
SHAPE = (3, 3, 8, 8)
L2 = 6 * 8 * 16 * 4  # six activations of an image

DIRECT, POINTERS = DirectTile(2, 4, 4, None, None, 4), PointerTile(16, 16, 16, 4, 1)


@pytest.fixture
def model():
    return randomize(Architecture(8, 1, 3, 2, "gelu", 3, 7).build()).to(DEVICE)


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    monkeypatch.setattr(sweeps, "depthwise_candidates", lambda size, dtype: [DIRECT])
    monkeypatch.setattr(sweeps, "pointwise_candidates", lambda dtype, tma: [POINTERS])
    monkeypatch.setattr(tuning, "l2_bytes", lambda device: L2)


def make(model, **options):
    return optimize(model, backend="triton", **options)


def tuned(model, folder, **options):
    fast = make(model)
    x = torch.randn(SHAPE, device=DEVICE)
    return fast, x, fast.tune(x, seconds=0, folder=folder, progress=False, **options)


@pytest.fixture
def fixed_times(monkeypatch):
    """Say which candidate is fast instead of measuring: others take a second, those none."""
    fast = {
        str(DIRECT): 0.5,
        "3": 0.25,
    }  # after the table, all images at once and one at a time, two

    def medians(device, runs, seconds, repeats=1, captured=True):
        return {name: fast.get(name, 1.0) for name in runs}

    monkeypatch.setattr(sweeps, "medians_on", medians)
    monkeypatch.setattr(tuning, "medians_on", medians)


def test_what_is_measured_is_what_runs(model, tmp_path, fixed_times, monkeypatch):
    fast, x, found = tuned(model, tmp_path)
    assert found.tuned.chunk == 2
    assert found.gain == 4
    assert not found.cached
    chosen = {problem.op: tile for problem, tile in found.tuned.tiles.items()}
    assert chosen["depthwise_block"] == DIRECT
    assert chosen["pointwise_block"] != POINTERS  # as fast as the table's tile, which comes first
    used = []
    for name in ("depthwise_launch", "pointwise_launch"):
        real = getattr(trunks, name)

        def launch(x, *args, real=real):
            used.append((len(x), args[-1]))
            return real(x, *args)

        monkeypatch.setattr(trunks, name, launch)
    with torch.no_grad():
        torch.testing.assert_close(
            fast(x), model(x), rtol=0, atol=MODEL_TOL[torch.float32] * float(model(x).abs().max())
        )
    # Two plans, for one image and for two; nothing else is chosen by the table.
    assert {images for images, _ in used} == {1, 2}
    assert {tile for _, tile in used} == set(chosen.values())
    # Another shape has not been tuned.
    used.clear()
    with torch.no_grad():
        fast(x[:2])
    assert {tile for _, tile in used} == {None}


def test_the_table_stays_where_nothing_is_faster(model, tmp_path, monkeypatch):
    def medians(device, runs, seconds, repeats=1, captured=True):
        return {name: 2.0 if name in ("1", "2", "3", "4") else 1.0 for name in runs}

    monkeypatch.setattr(sweeps, "medians_on", medians)
    monkeypatch.setattr(tuning, "medians_on", medians)
    _, _, found = tuned(model, tmp_path)
    assert (found.tuned.chunk, found.tuned.tiles, found.gain) == (None, {}, 1)


def test_another_process_finds_the_file(model, tmp_path, fixed_times, monkeypatch):
    _, _, first = tuned(model, tmp_path)
    monkeypatch.setattr(tuning, "sweep", None)  # not measured again
    fast, _, second = tuned(copy.deepcopy(model), tmp_path)
    assert second.cached
    assert second.tuned == first.tuned
    (path,) = tmp_path.glob("tuned-*.json")
    key = json.loads(path.read_text())["key"]
    assert set(key) >= {"device", "driver", "triton", "convmixer_fast", "shape"}
    assert fast.tuned


@pytest.mark.parametrize(
    ("where", "name"),
    sparse(
        [
            (triton, "__version__"),
            (torch, "__version__"),
            (tuning, "__version__"),
            (tuning, "_kernels"),
            (tuning, "device_name"),
        ],
        lambda point: False,
        ids=lambda point: f"{point[0].__name__}.{point[1]}",
    ),
)
def test_what_it_depends_on(model, tmp_path, fixed_times, monkeypatch, where, name):
    tuned(model, tmp_path)
    changed = (lambda *args: "another") if callable(getattr(where, name)) else "another"
    monkeypatch.setattr(where, name, changed)
    assert not tuned(model, tmp_path)[2].cached


def test_the_driver_counts_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tuning, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(tuning, "_driver", lambda: "version 1")
    assert tuning.environment(torch.device("cuda"))["driver"] == "version 1"


def test_a_chunk_that_is_set_stays(model, tmp_path, fixed_times):
    fast = make(model, chunk=2)
    x = torch.randn(SHAPE, device=DEVICE)
    assert fast.tune(x, seconds=0, folder=tmp_path, progress=False).tuned.chunk == 2


def test_a_tile_for_the_tma_is_not_forced(tmp_path):
    """Tuned on contiguous images; the stem reads others, of patches of one pixel, as they are."""
    model = randomize(Architecture(16, 1, 3, 1, "relu", 8, 5).build()).to(DEVICE)
    fast = optimize(model, backend="triton", dtype=torch.float16)
    x = torch.randn(2, 8, 4, 4, device=DEVICE).half()
    stem = next(
        iter(fast._engine.bare_trunks(fast, x)[0]().problems(x)),
    )
    chosen = Tuned(None, {stem: TmaTile(64, 64, 64, False, 4, 3)})
    fast._tuned = {tuned_for(x.device, x.dtype, tuple(x.shape)): chosen.to_json()}
    with torch.no_grad():
        expected = fast(x)
        odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
        for other in (x.contiguous(memory_format=torch.channels_last), odd):
            torch.testing.assert_close(fast(other), expected)


def test_choices_of_another_version_are_not_used(model, caplog):
    fast = make(model)
    x = torch.randn(SHAPE, device=DEVICE)
    key = tuned_for(x.device, x.dtype, tuple(x.shape))
    fast._tuned = {key: {"chunk": None, "tiles": [[{"op": "?"}, "NoTile", {}]]}}
    with torch.no_grad():
        fast(x)
    assert "of another version" in caplog.text


@pytest.mark.exhaustive
@pytest.mark.parametrize("damage", ["{", "[]", '{"key": 1}', '{"tuned": {}}'])
def test_a_damaged_file_is_made_again(model, tmp_path, fixed_times, caplog, damage):
    tuned(model, tmp_path)
    (path,) = tmp_path.glob("tuned-*.json")
    path.write_text(damage)
    assert not tuned(model, tmp_path)[2].cached
    assert tuned(model, tmp_path)[2].cached


def test_a_folder_that_cannot_be_written_is_reported(model, tmp_path, fixed_times, caplog):
    folder = tmp_path / "file"
    folder.write_text("")
    assert not tuned(model, folder)[2].cached
    assert "what is tuned is not kept" in caplog.text


def test_who_comes_second_waits(model, tmp_path, fixed_times, monkeypatch):
    inside, go_on, order = threading.Event(), threading.Event(), []
    real = tuning._tiles

    def slow(*args):
        order.append("measured")
        inside.set()
        assert go_on.wait(30)
        return real(*args)

    monkeypatch.setattr(tuning, "_tiles", slow)
    results = []

    def run():
        results.append(tuned(model, tmp_path)[2].cached)

    threads = [threading.Thread(target=run) for _ in range(2)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, True]
    assert len(order) == len(tuning.chunks_to_try(3, L2 // 6, L2))


def test_copies_keep_what_was_tuned(model, tmp_path, fixed_times):
    fast, x, _ = tuned(model, tmp_path)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.tuned == fast.tuned
        with torch.no_grad():
            assert torch.equal(other(x), fast(x))
    # Nothing in the pickle needs Triton.
    assert b"convmixer_fast.kernels" not in pickle.dumps(fast)


def test_progress_is_shown(model, tmp_path, fixed_times, monkeypatch):
    written = io.StringIO()
    real = progress.Console
    monkeypatch.setattr(
        progress, "Console", lambda **kw: real(file=written, force_terminal=True, width=200)
    )
    make(model).tune(torch.randn(SHAPE, device=DEVICE), seconds=0, folder=tmp_path)
    assert "tuning" in written.getvalue()


@pytest.mark.parametrize(
    "dtype", sparse([torch.float16, torch.float32], lambda dtype: dtype == torch.float32, ids=str)
)
@pytest.mark.exhaustive
def test_measured_for_real(model, tmp_path, dtype):
    fast = optimize(model, backend="triton", dtype=dtype)
    x = torch.randn(SHAPE).to(DEVICE, dtype)
    found = fast.tune(x, seconds=0, folder=tmp_path, progress=False)
    assert found.seconds["table"] > 0
    with torch.no_grad():
        expected = model(x.float())
        error = (fast(x).float() - expected).abs().max() / expected.abs().max()
    assert error <= MODEL_TOL[dtype]


def test_refusals(model, tmp_path):
    x = torch.randn(SHAPE, device=DEVICE)
    with pytest.raises(BackendUnavailableError, match=r"runs on the backend 'reference'"):
        optimize(model, backend="reference").tune(x)
    fast = make(model)
    fast.blocks[0].register_forward_hook(lambda *args: None)
    with pytest.raises(BackendUnavailableError, match="forward hook"):
        fast.tune(x)
    with pytest.raises(BackendUnavailableError, match="the ops refuse torch.float32"):
        make(model).tune(x[:, :2])


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "auto", True])
def test_chunk_is_checked(model, chunk):
    with pytest.raises(ValueError, match="chunk must be None or a number of images"):
        optimize(model, chunk=chunk)


def test_chunks_to_try():
    # Design: an H100's 50 MB hold about 11 images of 768/32.
    assert tuning.chunks_to_try(256, 768 * 1024 * 2, 50 * 2**20) == [None, 5, 11, 16]
    assert tuning.chunks_to_try(8, 768 * 1024 * 2, 50 * 2**20) == [None, 5]
    assert tuning.chunks_to_try(1, 768 * 1024 * 2, 50 * 2**20) == [None]
    assert tuning.chunks_to_try(256, 768 * 1024 * 2, 0) == [None]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_folder() == tmp_path / "convmixer_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_folder().parts[-2:] == (".cache", "convmixer_fast")


def test_compiling_is_reported_once(model, caplog):
    fast = make(model, cuda_graphs=False)
    x = torch.randn(SHAPE, device=DEVICE)
    with caplog.at_level(logging.INFO, "convmixer_fast"), torch.no_grad():
        fast(x)
        assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
        assert "compiling Triton kernels for torch.float32 of shape (3, 3, 8, 8)" in caplog.text
        fast(x)
        assert len(caplog.records) == 2
