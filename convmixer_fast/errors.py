"""The exceptions that this package raises on purpose.

Wrong shapes raise ``ValueError`` and wrong dtypes ``TypeError``, as in PyTorch;
the classes here are for what those two cannot say.
"""

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "ConvMixerFastError",
    "ExportedFileError",
    "InferenceOnlyError",
    "MismatchError",
    "MissingDependencyError",
    "ReleasedWeightsError",
    "TensorRTError",
    "UnsupportedModelError",
]


class ConvMixerFastError(Exception):
    """Base class of the exceptions below."""


class UnsupportedModelError(ConvMixerFastError, ValueError):
    """The module is not a ConvMixer that this package can run; says where it first differs."""


class BackendUnavailableError(ConvMixerFastError, RuntimeError):
    """A backend that was asked for by name cannot run here; says why."""


class CheckpointError(ConvMixerFastError, ValueError):
    """A file is not a checkpoint of a ConvMixer, or is damaged, or would run code."""


class ExportedFileError(ConvMixerFastError, ValueError):
    """A file is not what an exporter writes, or is damaged, or of a kind that is not taken."""


class InferenceOnlyError(ConvMixerFastError, RuntimeError):
    """Gradients or training were asked of a module that has only a forward pass."""


class MismatchError(ConvMixerFastError, RuntimeError):
    """An optimized model does not compute what the original does."""


class MissingDependencyError(ConvMixerFastError, ImportError):
    """A package that only a part of this one needs is not installed; says which."""


class ReleasedWeightsError(ConvMixerFastError, RuntimeError):
    """Something needs weights that a module has let go of: ``optimize(release=True)``."""


class TensorRTError(ConvMixerFastError, RuntimeError):
    """TensorRT refused a layer, a file, an engine or a call; has what its logger said."""
