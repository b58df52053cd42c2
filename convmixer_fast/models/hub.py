"""Checkpoints on the Hugging Face hub, through ``huggingface_hub``: its cache, token, offline mode.

Names are timm's: ``hf-hub:timm/convmixer_768_32.in1k``, with ``@revision`` behind if need be.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from convmixer_fast._version import __version__
from convmixer_fast.errors import CheckpointError, MissingDependencyError
from convmixer_fast.models.published import PUBLISHED

__all__ = ["CONFIG", "WEIGHTS", "Repository", "fetch", "hub_repository", "metadata_of"]

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Of which the first that is there is read."""
_PREFIXES = ("hf-hub:", "hf_hub:")


class Repository(NamedTuple):
    """A model on the hub."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        """Return the name that users write."""
        return f"hf-hub:{self.name}" + (f"@{self.revision}" if self.revision else "")


def hub_repository(name: object) -> Repository | None:
    """Return what a name of the hub names; None for others."""
    text = str(name)
    for prefix in _PREFIXES:
        if text.startswith(prefix):
            repository, _, revision = text.removeprefix(prefix).partition("@")
            return Repository(repository, revision or None)
    return None


def fetch(repository: Repository, *names: str, **options: Any) -> Path:
    """Return the first of some files that a repository has, downloaded unless the cache has it.

    Args:
        repository: on the hub.
        names: of files, the best first.
        options: of ``huggingface_hub.hf_hub_download``: token, cache_dir, local_files_only ...

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        CheckpointError: there is none of them, or the hub cannot be reached; says which.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingDependencyError(
            f"{repository} needs huggingface_hub ({error}): pip install 'convmixer-fast[hub]'"
        ) from error
    for name in names:
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repository.name,
                    name,
                    revision=repository.revision,
                    library_name="convmixer_fast",
                    library_version=__version__,
                    **options,
                )
            )
        except errors.LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"{repository}: {name} is not in the cache, and the hub cannot be reached (no "
                "network, or HF_HUB_OFFLINE is set); download it where there is a network, with "
                f"'hf download {repository.name}', or pass the file itself"
            ) from error
        except errors.EntryNotFoundError:
            continue
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{repository}: the hub has no such model, or it is private: then log in with 'hf "
                "auth login' or set HF_TOKEN"
            ) from error
        except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{repository}: the hub refuses: {reason}") from error
    raise CheckpointError(f"{repository}: it has none of {', '.join(names)}")


def metadata_of(path: Path, repository: Repository) -> dict[str, str]:
    """Return what timm's ``config.json`` says, as a checkpoint's metadata: JSON by name.

    Raises:
        CheckpointError: it is no such file.
    """
    try:
        said = json.loads(path.read_bytes())
        known = {**said, **said.get("pretrained_cfg", {})}
        architecture = str(known.get("architecture", "")).partition(".")[0]
        found: dict[str, Any] = {name: known.get(name) for name in ("crop_pct", "mean", "std")}
        size = known.get("input_size") or [None]
        found["image_size"] = size[-1]
        labels = known.get("label_names")
        if labels is None and isinstance(known.get("id2label"), dict):
            labels = [known["id2label"][str(index)] for index in range(len(known["id2label"]))]
        found["labels"] = labels
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{repository}: {CONFIG} is not what timm writes: {error!r}"
        ) from error
    metadata = {name: json.dumps(value) for name, value in found.items() if value is not None}
    activation = known.get("activation")
    if activation is None and architecture in PUBLISHED:
        activation = PUBLISHED[architecture].activation
    return metadata if activation is None else {**metadata, "activation": str(activation)}
