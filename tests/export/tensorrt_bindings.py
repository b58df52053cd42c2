"""TensorRT's real Python bindings over stub libraries: every name, signature and conversion.

pip has the bindings in packages of a megabyte, without the libraries of some gigabytes that they
load. ``tensorrt_stub.c`` stands for these.
"""

import ctypes
import importlib
import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from tests.paths import ROOT

SOURCE = Path(__file__).with_name("tensorrt_stub.c")
LIBRARIES = {"nvinfer": SOURCE, "nvinfer_plugin": None, "nvonnxparser": None}
"""The loader looks a symbol up in all libraries at once: one can hold the symbols of the three."""
PACKAGES = {
    "11.4": "tensorrt_cu13_bindings==11.4.*",
    "10.13": "tensorrt_cu12_bindings==10.13.0.*",
}
"""The newest version that the export code is written for, and the oldest."""


def why_not() -> str | None:
    """Say why the stubs cannot be built or loaded here; None if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "needs Linux on x86-64, for which the stubs of TensorRT's libraries are written"
    return None if shutil.which("cc") else "needs a C compiler"


def find_site(version: str) -> Path | str:
    """Return the folder with the bindings of a version, or why there is none.

    ``"installed"`` are those of the environment; others are kept in ``build/``, where pip puts
    them when they are asked for first.
    """
    if version == "installed":
        found = importlib.util.find_spec("tensorrt_bindings")
        if found is None or found.origin is None:
            return (
                "needs TensorRT's bindings: pip install --no-deps tensorrt_cu13_bindings (this "
                "test checks the installed ones, others check those that pip gets)"
            )
        return Path(found.origin).parent.parent
    site = ROOT / "build" / f"tensorrt-{version}-{sys.implementation.cache_tag}"
    if not list(site.glob("*.dist-info")):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "0"]
        command += ["--timeout", "20", "--target", str(site), PACKAGES[version]]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            said = (ran.stderr.strip().splitlines() or ["it says nothing"])[-1]
            return f"needs {PACKAGES[version]}, which pip cannot get: {said}"
    return site


def build_stubs(major: int, folder: Path) -> list[Path]:
    """Build every library that the bindings of a major version ask for; return their paths.

    The soname is what makes the loader take a library that is open already for the one that it
    looks for.
    """
    paths = []
    for name, source in LIBRARIES.items():
        path = folder / f"lib{name}.so.{major}"
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", str(path), "-x", "c"]
        subprocess.run(["cc", *flags, str(source or "/dev/null"), "-lstdc++"], check=True)
        paths.append(path)
    return paths


def load(site: Path, folder: Path) -> ModuleType:
    """Import the ``tensorrt_bindings`` in ``site`` as ``tensorrt``, ``tensorrt.plugin`` included.

    Once in a process: versions share module names and C++ types. The stubs are built in ``folder``.
    """
    if "tensorrt" in sys.modules:
        raise RuntimeError(f"tensorrt is loaded already: {sys.modules['tensorrt'].__file__}")
    info = next(site.glob("tensorrt_cu*_bindings-*.dist-info"))
    major = int(info.name.split("-")[1].split(".")[0])
    for path in build_stubs(major, folder):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(site))
    try:
        bindings = importlib.import_module("tensorrt_bindings")
    finally:
        sys.path.remove(str(site))
    # What the package `tensorrt` does with `import *`. As an alias it serves `tensorrt.plugin` too,
    # which that package lacks in 10.13.
    sys.modules["tensorrt"] = bindings
    return bindings
