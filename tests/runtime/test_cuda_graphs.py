"""The cache of CUDA graphs: its logic with a device made up, the real one where there is one."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from convmixer_fast import optimize
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.runtime import engine
from convmixer_fast.runtime.cuda_graphs import CudaGraphs
from tests.tolerances import MODEL_TOL


class FakeCall:
    """Like a graph: memory of its own, written to at each replay, one at a time."""

    def __init__(self, device, call, x):
        self.device, self.call = device, call
        self.x, self.out = x.clone(), call(x)

    def replay(self, x, static_output):
        assert not self.device.busy, "two graphs that share memory run at once"
        self.device.busy = True
        self.x.copy_(x)
        time.sleep(0.001)
        self.out.copy_(self.call(self.x))
        self.device.busy = False
        self.device.replays += 1
        return self.out if static_output else self.out.clone()

    def finish(self):
        self.device.finished.append(tuple(self.x.shape))


class FakeDevice:
    def __init__(self):
        self.busy, self.capturing = False, False
        self.captured, self.finished, self.replays = [], [], 0

    def is_capturing(self):
        return self.capturing

    def capture(self, call, x):
        self.captured.append(tuple(x.shape))
        return FakeCall(self, call, x)


def double(x, result):
    return 2 * x + len(result)


def graphs(**options):
    device = FakeDevice()
    return CudaGraphs(double, device=device, **options), device


def test_a_shape_is_captured_when_it_comes_again():
    call, device = graphs()
    x = torch.randn(3, 4)
    for expected in ([], [(3, 4)], [(3, 4)]):
        assert torch.equal(call(x, "mean"), 2 * x + 4)
        assert device.captured == expected
    assert device.replays == 2


def test_at_once_if_asked_for():
    call, device = graphs(first_calls=0)
    call(torch.ones(2), "mean")
    assert device.captured == [(2,)]


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(4, 3),
        torch.ones(3, 4).double(),
        torch.ones(4, 3).T,
    ],
    ids=["shape", "dtype", "layout"],
)
def test_other_inputs_have_graphs_of_their_own(other):
    call, device = graphs(first_calls=0)
    for x in (torch.ones(3, 4), other):
        assert torch.equal(call(x, "mean"), double(x, "mean"))
    assert len(device.captured) == 2
    call(other, "logits")
    assert len(device.captured) == 3


def test_the_longest_unused_graph_goes_first():
    call, device = graphs(first_calls=0, capacity=2)
    for size in (1, 2, 1, 3, 1, 2):
        call(torch.ones(size), "mean")
    assert device.captured == [(1,), (2,), (3,), (2,)]
    assert device.finished == [(2,), (3,)]


def test_what_was_seen_is_bounded():
    call, device = graphs(capacity=1)
    for size in range(1, 7):
        call(torch.ones(size), "mean")
    call(torch.ones(1), "mean")  # forgotten: the first again
    assert device.captured == []
    call(torch.ones(6), "mean")
    assert device.captured == [(6,)]


def test_results_are_copies_unless_static():
    x = torch.ones(2)
    for static in (False, True):
        call, _ = graphs(first_calls=0, static_output=static)
        first = call(x, "mean")
        call(5 * x, "mean")
        assert torch.equal(first, double(5 * x if static else x, "mean"))


def test_kernels_join_a_capture_that_is_running():
    call, device = graphs(first_calls=0)
    device.capturing = True
    assert torch.equal(call(torch.ones(2), "mean"), double(torch.ones(2), "mean"))
    assert device.captured == []


def test_empty_batches_need_no_graph():
    call, device = graphs(first_calls=0)
    assert call(torch.ones(0, 3), "mean").shape == (0, 3)
    assert device.captured == []


def test_threads_take_turns():
    call, device = graphs(first_calls=0, capacity=2)
    inputs = [torch.randn(size) for size in (2, 3, 4)]

    def work(index):
        x = inputs[index % 3] + index
        return torch.equal(call(x, "mean"), double(x, "mean"))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(60)))
    assert device.replays == 60


def test_a_failing_capture_leaves_no_lock_behind():
    call, device = graphs(first_calls=0)
    device.capture = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        call(torch.ones(2), "mean")
    del device.capture
    done = threading.Event()
    threading.Thread(target=lambda: (call(torch.ones(2), "mean"), done.set())).start()
    assert done.wait(5)


def test_without_memory_for_a_graph_the_kernels_run():
    call, device = graphs()

    def fail(*_):
        device.captured.append("tried")
        raise torch.OutOfMemoryError

    device.capture = fail
    for _ in range(4):
        assert torch.equal(call(torch.ones(2), "mean"), double(torch.ones(2), "mean"))
    assert device.captured == ["tried"]
    asked = CudaGraphs(double, device=device, first_calls=0)
    with pytest.raises(torch.OutOfMemoryError):
        asked(torch.ones(2), "mean")


def test_a_shallow_copy_computes_its_own(monkeypatch):
    pytest.importorskip("convmixer_fast._C", reason="needs the compiled extension")
    fast = optimize(randomize(Architecture(8, 1, 3, 2, "gelu").build()), backend="cpu")
    x = torch.randn(1, 3, 8, 8)
    other = copy.copy(fast)
    other._modules = dict(fast._modules)
    other.head = torch.nn.Linear(8, 5).requires_grad_(False)
    with torch.inference_mode():
        assert fast(x).shape == (1, 1000)
        assert other(x).shape == (1, 5)
        assert fast(x).shape == (1, 1000)


@pytest.mark.cuda
@pytest.mark.device
@pytest.mark.parametrize("static_output", [False, True])
def test_results_outlive_other_shapes(static_output):
    model = randomize(Architecture(64, 2, 5, 2, "gelu").build()).cuda().half()
    fast = optimize(model, cuda_graphs=True, static_output=static_output)
    plain = optimize(model, cuda_graphs=False)
    sizes = range(1, 7 if static_output else 11)  # more than are kept
    inputs = [torch.randn(size, 3, 32, 32, device="cuda").half() for size in sizes]
    with torch.inference_mode():
        for _ in range(2):
            outs = [fast(x) for x in inputs]
            for x, out in zip(inputs, outs, strict=True):
                torch.testing.assert_close(out, plain(x))


def test_the_option_is_checked():
    model = randomize(Architecture(8, 1, 3, 2, "gelu").build())
    with pytest.raises(ValueError, match="cuda_graphs must be 'auto', True or False, got 'yes'"):
        optimize(model, cuda_graphs="yes")


@pytest.mark.parametrize(("option", "captures"), [("auto", 1), (True, 1), (False, 0)])
def test_an_engine_with_graphs(option, captures, monkeypatch):
    pytest.importorskip("convmixer_fast._C", reason="needs the compiled extension")
    device = FakeDevice()
    monkeypatch.setattr(engine, "_has_graphs", lambda *_: True)
    monkeypatch.setattr("convmixer_fast.runtime.cuda_graphs.CudaDevice", lambda **_: device)
    model = randomize(Architecture(8, 1, 3, 2, "gelu").build())
    fast = optimize(model, backend="cpu", cuda_graphs=option)
    for _ in range(2):
        x = torch.randn(1, 3, 8, 8)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x))
    assert len(device.captured) == captures
    # Other weights: another trunk, other graphs.
    fast.load_state_dict({name: 2 * t for name, t in fast.state_dict().items()})
    with torch.inference_mode():
        assert not torch.allclose(fast(x), model(x))


@pytest.mark.cuda
@pytest.mark.device
@pytest.mark.parametrize("static_output", [False, True])
def test_graphs_on_a_device(static_output):
    model = randomize(Architecture(64, 4, 5, 2, "gelu").build()).cuda().half()
    plain = optimize(model, cuda_graphs=False)
    fast = optimize(model, cuda_graphs=True, static_output=static_output)
    with torch.inference_mode():
        for batch in (1, 4, 1, 3, 4):
            x = torch.randn(batch, 3, 32, 32, device="cuda", dtype=torch.half)
            torch.testing.assert_close(fast(x), plain(x))
        channels_last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fast(channels_last), plain(x))
    with torch.no_grad():  # replays write to tensors made in the other mode
        torch.testing.assert_close(fast(x), plain(x))


@pytest.mark.cuda
@pytest.mark.device
def test_graphs_on_many_streams_and_threads():
    model = randomize(Architecture(64, 4, 5, 2, "gelu").build()).cuda().half()
    fast = optimize(model, cuda_graphs=True)
    inputs = [torch.randn(1 + i % 3, 3, 32, 32, device="cuda").half() for i in range(12)]
    with torch.inference_mode():
        expected = [optimize(model, cuda_graphs=False)(x) for x in inputs]
    torch.cuda.synchronize()

    def work(index):
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            outs = [fast(inputs[index]) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(out, outs[0]) for out in outs), outs[0]

    with ThreadPoolExecutor(6) as pool:
        for (same, out), right in zip(pool.map(work, range(12)), expected, strict=True):
            assert same
            torch.testing.assert_close(out, right)


@pytest.mark.cuda
@pytest.mark.device
def test_graphs_inside_a_capture_of_the_users():
    model = randomize(Architecture(64, 2, 5, 2, "gelu").build()).cuda().half()
    fast = optimize(model, cuda_graphs=True)
    x = torch.randn(2, 3, 32, 32, device="cuda").half()
    with torch.inference_mode():
        expected = fast(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fast(x)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(out, expected)


@pytest.mark.device
def test_whole_engine_on_triton():
    from convmixer_fast.runtime import backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = backends.why_not("triton", device, torch.float16)
    if reason is not None:
        pytest.skip(f"needs Triton: {reason}")
    model = randomize(Architecture(24, 2, 5, 3, "gelu").build()).to(device)
    fast = optimize(model, backend="triton", dtype=torch.float16)
    x = torch.randn(2, 3, 13, 16, device=device)
    with torch.inference_mode():
        out = fast(x.half())
        found = fast._engine._ready(fast, x.half())
        exact = model.double()(x.double())
    assert found is not None
    assert type(out) is torch.Tensor
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error <= MODEL_TOL[torch.float16]


def test_warmup_captures(monkeypatch):
    pytest.importorskip("convmixer_fast._C", reason="needs the compiled extension")
    device = FakeDevice()
    monkeypatch.setattr(engine, "_has_graphs", lambda *_: True)
    monkeypatch.setattr("convmixer_fast.runtime.cuda_graphs.CudaDevice", lambda **_: device)
    fast = optimize(randomize(Architecture(8, 1, 3, 2, "gelu").build()), backend="cpu")
    fast.warmup((1, 3, 8, 8), (4, 3, 8, 10))
    assert device.captured == [(1, 3, 8, 8), (4, 3, 8, 10)]
    with pytest.raises(ValueError, match="x must have 3 channels"):
        fast.warmup((1, 5, 8, 8))


def test_a_trunk_follows_autocast():
    pytest.importorskip("convmixer_fast._C", reason="needs the compiled extension")
    model = randomize(Architecture(8, 1, 3, 2, "gelu").build())
    fast = optimize(model, backend="cpu")
    x = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        for image in (x, x.bfloat16()):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                out, expected = fast(image), model(image)
                found = fast._engine._ready(fast, image)
            assert out.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
            assert found is not None
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
        assert len(fast._engine._made) == 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError):
        fast(x.double())


@pytest.mark.cuda
@pytest.mark.device
def test_autocast_on_a_device():
    model = randomize(Architecture(64, 2, 5, 2, "gelu").build()).cuda()
    fast = optimize(model)
    x = torch.randn(2, 3, 32, 32, device="cuda")
    with torch.inference_mode():
        truth = model.double()(x.double())
        model.float()
        for _ in range(3):
            with torch.autocast("cuda", torch.float16):
                out, eager = fast(x), model(x)
            assert out.dtype == eager.dtype == torch.float16
            assert (out - truth).abs().max() <= 1.5 * (eager - truth).abs().max()
