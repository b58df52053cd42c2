"""The model that a user of the command line names: a file, an architecture, a published name."""

from torch import nn

from convmixer_fast.choices import ActivationName
from convmixer_fast.models.checkpoint import is_checkpoint, load
from convmixer_fast.models.published import PUBLISHED, Architecture
from convmixer_fast.models.randomize import randomize

__all__ = ["find_model", "stem_shape"]


def find_model(
    name: str, activation: ActivationName | None, pretrained: bool
) -> tuple[nn.Module, bool]:
    """Return the model that a user named, and whether its weights are trained.

    Args:
        name: a checkpoint file, ``hf-hub:`` and a model on the Hugging Face hub,
            ``dim/depth/kernel/patch``, or a name of timm's.
        activation: where neither the file nor the name tells.
        pretrained: whether timm is to load trained weights; else they are random.

    Raises:
        ValueError: there is no such model.
    """
    if is_checkpoint(name):
        return load(name, activation=activation), True
    numbers = name.split("/")
    if all(number.isdigit() for number in numbers):
        if len(numbers) != 4:
            raise ValueError(
                f"{name!r}: dim/depth/kernel/patch are four numbers, such as 256/8/5/2, got "
                f"{len(numbers)}"
            )
        dim, depth, kernel, patch = map(int, numbers)
        architecture = Architecture(dim, depth, kernel, patch, activation or "gelu")
        return randomize(architecture.build()), False
    if name in PUBLISHED and not pretrained:
        return randomize(PUBLISHED[name].build()), False
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        known = ", ".join(PUBLISHED)
        remedy = (
            "pip install 'convmixer-fast[timm]'"
            if isinstance(error, ImportError)
            else "the torchvision installed does not belong to this build of PyTorch"
        )
        raise ValueError(
            f"{name!r} is no file, no dim/depth/kernel/patch and none of {known}, and timm, which "
            f"might know it, cannot be imported ({error}): {remedy}"
        ) from error
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except RuntimeError as error:
        raise ValueError(
            f"{name!r} is no file, no dim/depth/kernel/patch, and timm: {error}"
        ) from (error)
    return (model.eval() if pretrained else randomize(model)), pretrained


def stem_shape(model: nn.Module) -> tuple[int, int]:
    """Return the channels of an image, and the side of a patch."""
    weight = next(p for p in model.parameters() if p.dim() == 4)
    return weight.shape[1], weight.shape[2]
