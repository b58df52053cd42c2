"""``save_pretrained``, ``push_to_hub``, ``from_pretrained``, as the hub's own library has them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from convmixer_fast._version import __version__
from convmixer_fast.errors import ExportedFileError, MissingDependencyError
from convmixer_fast.models.hub import CONFIG, WEIGHTS, Repository, fetch
from convmixer_fast.runtime.plain_data import from_plain_data, to_plain_data
from convmixer_fast.support.files import new_file, write_whole

if TYPE_CHECKING:
    from convmixer_fast.spec import FoldedConvMixer

__all__ = ["Pretrained"]

_LIBRARY = "convmixer_fast"
_CARD = """---
library_name: convmixer_fast
tags:
- image-classification
- convmixer
---

A ConvMixer ([arXiv 2201.09792](https://arxiv.org/abs/2201.09792)), its BatchNorms folded, for
inference by `convmixer_fast`{precision}:

```python
from convmixer_fast import FusedConvMixer

model = FusedConvMixer.from_pretrained("{name}")
```
"""


class Pretrained:
    """What an optimized module has of ``huggingface_hub.PyTorchModelHubMixin``, by its names.

    Files are ``model.safetensors`` and ``config.json``: tensors and JSON, no code.
    """

    pretrained_cfg: dict[str, Any]
    quantization: Any

    if TYPE_CHECKING:

        def folded(self) -> FoldedConvMixer:
            """Return what the module computes, as plain data."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> str | None:
        """Write the module to a folder, which is made where there is none.

        Args:
            save_directory: the folder.
            repo_id: on the hub; None takes the folder's name.
            push_to_hub: whether it is uploaded too.
            options: of :meth:`push_to_hub`.

        Returns:
            The address of the upload, if there was one.

        Raises:
            UnsupportedModelError: the module has parts of its source's own, which are code.
            ReleasedWeightsError: the weights are gone.
        """
        from safetensors.torch import save

        tensors, config = to_plain_data(self.folded())
        said = {
            "library_name": _LIBRARY,
            "version": __version__,
            **config,
            "pretrained_cfg": _plain(getattr(self, "pretrained_cfg", None) or {}),
        }
        if self.quantization is not None:
            said["quantization"] = _plain(asdict(self.quantization))  # for whoever reads it
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = new_file(folder / WEIGHTS[0])
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        write_whole(weights, save(on_cpu, metadata={"format": "pt"}))
        write_whole(folder / CONFIG, (json.dumps(said, indent=2) + "\n").encode())
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, **options)
        return None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using convmixer_fast.",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload the module to the Hugging Face hub; the repository is made where there is none.

        Args:
            repo_id: ``"user/name"``.
            commit_message: of the upload.
            private: whether a repository that is made is.
            token: of the hub; None takes that of ``hf auth login`` or HF_TOKEN.
            branch: to upload to.
            create_pr: whether to open a pull request instead.

        Returns:
            The address of the upload.

        Raises:
            MissingDependencyError: huggingface_hub is not installed.
            UnsupportedModelError, ReleasedWeightsError: see :meth:`save_pretrained`.
        """
        import tempfile

        hub = _hub()
        api = hub.HfApi(token=token, library_name=_LIBRARY, library_version=__version__)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            precision = ", in 8 bits" if self.folded().quantized_blocks() else ""
            if not api.file_exists(name, "README.md"):
                card = _CARD.format(name=name, precision=precision)
                (Path(folder) / "README.md").write_text(card)
            done = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        return str(done)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """Return a module that :meth:`save_pretrained` or :meth:`push_to_hub` wrote: the same bits.

        Args:
            pretrained_model_name_or_path: a folder, or ``"user/name"`` on the hub.
            revision: branch, tag or commit on the hub.
            token: of the hub; None takes that of ``hf auth login`` or HF_TOKEN.
            cache_dir: of downloads; None is huggingface_hub's.
            force_download: whether what the cache has is downloaded again.
            local_files_only: whether the cache alone is looked at.
            options: of the module: ``backend``, ``cuda_graphs``, ``chunk`` ...; see
                :func:`convmixer_fast.optimize`.

        Raises:
            ExportedFileError: the files are damaged, or of another model.
            CheckpointError: the hub has no such model, or cannot be reached.
            MissingDependencyError: huggingface_hub is needed and not installed.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            config, weights = folder / CONFIG, folder / WEIGHTS[0]
        else:
            repository = Repository(str(pretrained_model_name_or_path), revision)
            chosen = {
                "token": token,
                "cache_dir": cache_dir,
                "force_download": force_download,
                "local_files_only": local_files_only,
            }
            config = fetch(repository, CONFIG, **chosen)
            weights = fetch(repository, WEIGHTS[0], **chosen)
        said, tensors = _read(config, weights)
        module = cls(from_plain_data(tensors, said), **options)  # type: ignore[call-arg]
        if said.get("pretrained_cfg"):
            module.pretrained_cfg = said["pretrained_cfg"]
        return module


def _read(config: Path, weights: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        said = json.loads(config.read_bytes())
        tensors = load_file(weights)
    except (ValueError, RecursionError, SafetensorError, FileNotFoundError) as error:
        raise ExportedFileError(f"{config.parent}: no module that was saved: {error}") from error
    if not isinstance(said, dict) or said.get("library_name") != _LIBRARY:
        raise ExportedFileError(
            f"{config.parent}: expected what save_pretrained wrote; a trained ConvMixer of another "
            "library is read by convmixer_fast.load('hf-hub:...'), then optimized"
        )
    if not isinstance(said.get("pretrained_cfg", {}), dict):
        raise ExportedFileError(f"{config}: pretrained_cfg is no object")
    return said, tensors


def _plain(value: Any) -> Any:
    """Return what JSON holds of timm's configuration."""
    return json.loads(json.dumps(value, default=str))


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(
            f"push_to_hub needs huggingface_hub ({error}): pip install 'convmixer-fast[hub]'"
        ) from error
    return huggingface_hub
