"""Ctrl-C, full disks, other processes, no memory: nothing half is left, and the next call works."""

import json
import multiprocessing
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from convmixer_fast import optimize
from convmixer_fast.export import to_onnx, to_torch_export, to_triton_server
from convmixer_fast.models.published import Architecture
from convmixer_fast.models.randomize import randomize
from convmixer_fast.support import files
from tests.runtime.cpu_cases import run_python

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return randomize(Architecture(8, 1, 3, 2, "relu", 3, 4).build())


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def to_int8(model, path, **options):
    return to_onnx(model, path, image_size=8, precision="int8", calibration=IMAGES, progress=False)


def to_float32(model, path):
    return to_onnx(model, path, image_size=8, progress=False)


def to_pt2(model, path):
    return to_torch_export(model, path, image_size=8, progress=False)


@pytest.mark.parametrize(
    ("export", "name", "point"),
    [
        pytest.param(to_float32, "model.onnx", "onnx_export._write", marks=pytest.mark.exhaustive),
        (to_float32, "model.onnx", "onnx_export.check_file"),
        pytest.param(to_int8, "model.onnx", "onnx_export.classes_of", marks=pytest.mark.exhaustive),
        (to_int8, "model.onnx", "onnx_quantize._layer_errors"),
        (to_pt2, "model.pt2", "torch_export.check_outputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_ctrl_c_during_an_export(model, tmp_path, monkeypatch, export, name, point):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    path = tmp_path / name
    path.write_bytes(b"what an earlier export wrote")
    before = listing(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(f"convmixer_fast.export.{point}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(model, path)
    assert listing(tmp_path) == before
    export(model, path)  # and nothing is in the way of the next one
    assert set(listing(tmp_path)) == {name}


@pytest.mark.exhaustive
def test_ctrl_c_during_calibration_leaves_the_model_as_it_was(model, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("convmixer_fast.export.onnx_quantize._layer_errors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimize(model, precision="int8", calibration=IMAGES, progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    optimize(model, precision="int8", calibration=IMAGES, progress=False)(IMAGES)


def test_a_repository_is_never_half_a_model(model, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
    path = tmp_path / "model.onnx"
    to_float32(model, path)
    folder = to_triton_server(path, tmp_path / "repository")
    before = listing(folder)
    right = Path.replace

    def full(source, target):
        if str(target).endswith("model.onnx"):
            raise OSError(28, "No space left on device")
        return right(source, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        to_triton_server(path, tmp_path / "repository")
    assert listing(folder) == before


@pytest.mark.exhaustive
def test_a_file_is_whole_whoever_reads_it(tmp_path):
    """Two processes and eight threads write one file; every reader finds a whole one."""
    path = tmp_path / "kept.json"
    code = f"""
        import json, sys
        from pathlib import Path
        from convmixer_fast.support.files import write_whole
        for number in range(100):
            write_whole(Path({str(path)!r}), json.dumps([number] * 5000).encode())
    """

    def write(number):
        for _ in range(25):
            files.write_whole(path, json.dumps([number] * 5000).encode())

    def read():
        while not done.is_set():
            if path.is_file():
                assert len(set(json.loads(path.read_text()))) == 1
        return True

    done = threading.Event()
    with ThreadPoolExecutor(12) as executor:
        readers = [executor.submit(read) for _ in range(2)]
        others = [executor.submit(run_python, code) for _ in range(2)]
        for future in [executor.submit(write, number) for number in range(8)]:
            future.result()
        assert [other.result().returncode for other in others] == [0, 0]
        done.set()
        assert all(reader.result() for reader in readers)
    assert list(tmp_path.iterdir()) == [path]


class _Logits(Dataset):
    """Items that an optimized module computes."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.inference_mode():
            return self.module(IMAGES[index : index + 1])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)])
def test_workers(model, method):
    fast = optimize(model)
    with torch.inference_mode():
        expected = fast(IMAGES)
    context = multiprocessing.get_context(method)
    loader = DataLoader(
        _Logits(fast), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120
    )
    assert torch.equal(torch.cat(list(loader)), expected)
    with torch.inference_mode():
        assert torch.equal(fast(IMAGES), expected)


def test_an_error_in_one_thread_leaves_the_others_alone(model):
    fast = optimize(model)
    with torch.inference_mode():
        expected = fast(IMAGES)

    def call(number):
        with torch.inference_mode():
            for _ in range(50):
                if number % 2:
                    with pytest.raises(ValueError, match="channels"):
                        fast(IMAGES[:, :2])
                else:
                    assert torch.equal(fast(IMAGES), expected)
        return True

    with ThreadPoolExecutor(6) as executor:
        assert all(executor.map(call, range(6)))


@pytest.mark.skipif(platform.system() != "Linux", reason="needs Linux: limits address space")
@pytest.mark.exhaustive
def test_a_smaller_call_succeeds_where_memory_ran_out():
    code = """
        import resource, torch
        from convmixer_fast import optimize
        from convmixer_fast.models.published import Architecture
        from convmixer_fast.models.randomize import randomize
        torch.set_num_threads(1)
        fast = optimize(randomize(Architecture(64, 2, 3, 2, "relu", 3, 4).build()))
        small, large = torch.zeros(1, 3, 16, 16), torch.zeros(4, 3, 2048, 2048)
        with torch.inference_mode():
            expected = fast(small)
            pages = int(open("/proc/self/statm").read().split()[0])
            limit = pages * resource.getpagesize() + (96 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                fast(large)
            except (MemoryError, RuntimeError) as error:
                print(type(error).__name__)
            print(torch.equal(fast(small), expected))
    """
    done = run_python(code)
    assert done.stdout in ("MemoryError\nTrue\n", "RuntimeError\nTrue\n"), done.stderr
