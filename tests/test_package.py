"""What importing and installing the package does, and does not do."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from convmixer_fast.runtime import backends
from tests.paths import ROOT


def python(code, cwd=ROOT, **environment):
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_cheap_and_touches_no_device():
    """Timed inside one process after torch, best of three, since a first run reads from disk."""
    code = """
import time, torch, sys
before = set(sys.modules)
start = time.perf_counter()
import convmixer_fast
print(time.perf_counter() - start)
new = set(sys.modules) - before
heavy = {"triton", "timm", "torch.export", "sympy", "safetensors", "PIL", "rich", "typer"}
assert not heavy & new, heavy & new
assert "convmixer_fast._C" not in sys.modules
assert not torch.cuda.is_initialized()
"""
    assert min(float(python(code)) for _ in range(3)) < 0.2


def test_works_from_any_folder(tmp_path):
    code = "import convmixer_fast.kernels, convmixer_fast.export; print(convmixer_fast.__version__)"
    from convmixer_fast import __version__

    assert python(code, cwd=ROOT) == __version__
    assert python(code, cwd=tmp_path, PYTHONPATH=str(ROOT)) == __version__


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_wheel_holds_one_package(tmp_path):
    """Only convmixer_fast appears at the top level, with kernels, data and extension inside."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"convmixer_fast"}
    for expected in (
        "convmixer_fast/py.typed",
        "convmixer_fast/kernels/depthwise_block.py",
        "convmixer_fast/export/__init__.py",
        "convmixer_fast/data/digits.safetensors",
        "convmixer_fast/_C" + sysconfig.get_config_var("EXT_SUFFIX"),
    ):
        assert expected in names


def test_backend_info_and_selection_agree():
    import torch

    for row in backends.backend_info():
        assert row.detail
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if row.name != "triton":
            assert row.live == (
                backends.why_not(row.name, torch.device("cpu"), torch.float32) is None
            )
        elif device.type == "cuda":
            assert row.live == (backends.why_not("triton", device, torch.float32) is None)


def test_without_the_extension(monkeypatch):
    import torch

    backends._load_extension.cache_clear()
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    try:
        reason = backends.why_not("cpu", torch.device("cpu"), torch.float32)
        assert "was not built" in reason
        assert not {row.name: row for row in backends.backend_info()}["cpu"].live
    finally:
        monkeypatch.undo()
        backends._load_extension.cache_clear()


def test_an_extension_that_fails_to_load_is_reported(monkeypatch):
    import torch

    real = backends.importlib.import_module

    def broken(name, *args):
        if name == "convmixer_fast._C":
            raise ImportError("undefined symbol: nothing")
        return real(name, *args)

    backends._load_extension.cache_clear()
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backends.importlib, "import_module", broken)
    try:
        with pytest.warns(RuntimeWarning, match="failed to load: undefined symbol: nothing"):
            reason = backends.why_not("cpu", torch.device("cpu"), torch.float32)
        assert "undefined symbol: nothing" in reason
    finally:
        monkeypatch.undo()
        backends._load_extension.cache_clear()


def test_unknown_backend():
    import torch

    with pytest.raises(ValueError, match="backend must be 'auto' or one of 'triton', 'cpu', 'ref"):
        backends.why_not("cuda", torch.device("cpu"), torch.float32)


def test_reasons_name_what_is_missing(monkeypatch):
    import torch

    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "runs CPU tensors" in backends.why_not("cpu", cuda, torch.float32)
    assert "float64 is not supported" in backends.why_not("cpu", cpu, torch.float64)
    monkeypatch.setattr(backends, "_triton_missing", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "runs CUDA tensors" in backends.why_not("triton", cpu, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.why_not("triton", cpu, torch.float32) is None
    assert backends.resolve("auto", cpu, torch.float64) == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or newer, and cuda has 7.5" in backends.why_not("triton", cuda, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends.why_not("triton", cuda, torch.float16) is None
    assert backends.resolve("auto", cuda, torch.float16) == "triton"


def test_a_checkout_that_hides_an_installed_package_says_so(tmp_path):
    """Python started in a checkout takes its folder, where nothing is compiled."""
    checkout, installed = tmp_path / "checkout", tmp_path / "site-packages"
    for root in (checkout, installed):
        shutil.copytree(
            ROOT / "convmixer_fast",
            root / "convmixer_fast",
            symlinks=True,
            ignore=shutil.ignore_patterns("_C.*.so", "__pycache__"),
        )
        for name in ("kernels", "export", "benchmarks"):
            (root / name).symlink_to(ROOT / name)
    (installed / "convmixer_fast" / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    code = """
import sys
sys.path[:0] = sys.argv[1:]
# Of the installation that runs these tests, which would find the extension.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import convmixer_fast
rows = {row.name: row for row in convmixer_fast.backend_info()}
print(convmixer_fast.__file__, rows["cpu"].live, rows["cpu"].detail)
"""
    arguments = [sys.executable, "-I", "-c", code, str(checkout), str(installed)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=tmp_path)
    file, live, detail = done.stdout.strip().split(maxsplit=2)
    assert file == str(checkout / "convmixer_fast" / "__init__.py")
    assert live == "False"
    assert f"{checkout}/convmixer_fast has no compiled extension, and hides the inst" in detail
    assert f"{installed}/convmixer_fast, which has one" in detail


@pytest.mark.parametrize("name", ["kernels", "export", "benchmarks"])
def test_code_that_stands_beside_is_found_inside_by_tools_that_read_it(name):
    link = ROOT / "convmixer_fast" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name
