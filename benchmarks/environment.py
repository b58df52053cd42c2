"""What a result depends on besides the code under test: device, versions, threads, commit."""

import datetime
import hashlib
import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from convmixer_fast import _version
from convmixer_fast.runtime.backends import backend_info

__all__ = ["Environment", "environment"]

_LIBRARIES = ("torch", "triton", "numpy", "timm", "onnxruntime", "openvino", "tensorrt")
_ROOT = Path(__file__).resolve().parent.parent
_PER_RUN = ("command", "date")


@dataclass(frozen=True)
class Environment:
    """The stamp of every results file."""

    device: str
    """Name of the GPU, or model of the CPU."""
    device_type: str
    threads: int
    """``torch.get_num_threads()``."""
    driver: str
    """Of the GPU; empty on a CPU."""
    system: str
    python: str
    versions: dict[str, str]
    backends: dict[str, str]
    commit: str
    """Of the checkout, with ``+changes`` where files differ from it; empty outside one."""
    source: str
    """Digest of this package's files, for copies that have no repository around them."""
    tf32: bool
    """Whether float32 convolutions on a GPU may round their operands to TF32."""
    command: str
    date: str
    """When the run began, UTC."""
    processor: str = ""
    """Family, model and stepping of the CPU, which tell apart what has one name."""

    def differing(self, other: "Environment") -> list[str]:
        """Return the names of what differs, apart from the command and the date."""
        names = [field.name for field in fields(self) if field.name not in _PER_RUN]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def slug(self) -> str:
        """Return a folder name of device and date, as ``nvidia-h100-2026-11-21``."""
        name = re.sub(r"\((r|tm)\)", "", self.device.lower())
        device = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
        threads = "" if self.device_type == "cuda" else f"-{self.threads}-threads"
        return f"{device}{threads}-{self.date[:10]}"

    def summary(self) -> str:
        """Return one line: device, threads, versions, commit."""
        versions = ", ".join(f"{name} {self.versions[name]}" for name in self.versions)
        threads = "" if self.device_type == "cuda" else f", {self.threads} threads"
        if self.processor and self.device_type != "cuda":
            threads = f" ({self.processor}){threads}"
        where = self.commit[:17] or f"source {self.source}"
        return f"{self.device}{threads}; {versions}; commit {where}; {self.date}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data; ``Environment(**data)`` is the way back."""
        return asdict(self)


def environment(device: torch.device) -> Environment:
    """Describe this process on ``device``."""
    cuda = device.type == "cuda"
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if cuda:
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    conv: Any = torch.backends.cudnn
    return Environment(
        device=torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        device_type=device.type,
        threads=torch.get_num_threads(),
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else "",
        system=f"{platform.system()} {platform.machine()}",
        python=sys.version.split()[0],
        versions={"convmixer_fast": _version.__version__, **versions},
        backends={row.name: row.detail if row.live else "" for row in backend_info()},
        commit=_commit(),
        source=_digest(),
        tf32=conv.conv.fp32_precision == "tf32",
        command=shlex.join(_command()),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        processor="/".join(filter(None, map(_cpuinfo, ("cpu family", "model", "stepping")))),
    )


def _command() -> list[str]:
    # What `python -m module` was told, not the path of the file that it found.
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None:
        return [Path(sys.argv[0]).name, *sys.argv[1:]]
    return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def _cpu_name() -> str:
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def _cpuinfo(field: str) -> str:
    """Return what Linux says of the first processor; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _commit() -> str:
    if not (_ROOT / ".git").exists():
        return ""
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return _output("git", "rev-parse", "HEAD")[:12] + ("+changes" if changed else "")


def _digest() -> str:
    digest = hashlib.sha256()
    package = Path(_version.__file__).parent
    folders = [package, *(_ROOT / name for name in ("kernels", "csrc", "benchmarks"))]
    files = {
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu")
    }
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
