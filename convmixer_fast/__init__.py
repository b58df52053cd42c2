"""Fast ConvMixer inference: the same model, the same outputs, fused kernels.

``optimize(model)`` takes a trained ConvMixer and returns a drop-in module;
:mod:`convmixer_fast.ops` has the fused ops one by one. Importing this package
queries no device and loads no compiled code.
"""

from pathlib import Path as _Path

# In a checkout the sub-packages kernels, export and benchmarks stand beside this folder. Links to
# them stand in it, for tools that read code; a copy may be without those.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from convmixer_fast import _former_paths, errors, export, ops
from convmixer_fast._version import __version__
from convmixer_fast.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConvMixerFastError,
    ExportedFileError,
    InferenceOnlyError,
    ReleasedWeightsError,
    UnsupportedModelError,
)
from convmixer_fast.folding import fold
from convmixer_fast.models.checkpoint import load
from convmixer_fast.models.convmixer import ConvMixer
from convmixer_fast.optimize import optimize
from convmixer_fast.recognition.recognize import recognize
from convmixer_fast.runtime.backends import BackendStatus, backend_info
from convmixer_fast.runtime.fused import FusedConvMixer

_former_paths.install()

__all__ = [
    "BackendStatus",
    "BackendUnavailableError",
    "CheckpointError",
    "ConvMixer",
    "ConvMixerFastError",
    "ExportedFileError",
    "FusedConvMixer",
    "InferenceOnlyError",
    "ReleasedWeightsError",
    "UnsupportedModelError",
    "__version__",
    "backend_info",
    "errors",
    "export",
    "fold",
    "load",
    "ops",
    "optimize",
    "recognize",
]
