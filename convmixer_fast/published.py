"""The ConvMixers whose trained weights are published, and how their images are prepared."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from convmixer_fast.model import ConvMixer

__all__ = ["ACTIVATION_LAYERS", "PUBLISHED", "Architecture", "Preprocessing"]

ACTIVATION_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
}
"""What makes the module of each activation in :data:`reference.ACTIVATIONS`."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resize the shorter side, crop the centre, normalise."""

    image_size: int = 224
    """Side of the crop, in pixels."""
    crop_pct: float = 0.96
    """Side of the crop over the shorter side of the resized image."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {self.image_size}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if not all(std > 0 for std in self.std):
            raise ValueError(f"std must be above 0, got {self.std}")


@dataclass(frozen=True)
class Architecture:
    """What determines a ConvMixer apart from its weights."""

    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    activation: str
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "avg"

    def build(self) -> ConvMixer:
        """Return the reference model of this architecture, newly initialised, in eval mode.

        Raises:
            ValueError: ``activation`` is none of :data:`ACTIVATION_LAYERS`, or a size is wrong.
        """
        if self.activation not in ACTIVATION_LAYERS:
            known = ", ".join(map(repr, ACTIVATION_LAYERS))
            raise ValueError(f"activation must be one of {known}, got {self.activation!r}")
        return ConvMixer(
            self.dim,
            self.depth,
            kernel_size=self.kernel_size,
            patch_size=self.patch_size,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
            global_pool=self.global_pool,
            act_layer=ACTIVATION_LAYERS[self.activation],
        ).eval()


PUBLISHED = {
    "convmixer_1536_20": Architecture(1536, 20, 9, 7, "gelu"),
    # Trained with ReLU, by the authors and so in timm; its weights do not show it.
    "convmixer_768_32": Architecture(768, 32, 7, 7, "relu"),
    "convmixer_1024_20_ks9_p14": Architecture(1024, 20, 9, 14, "gelu"),
}
"""By timm's names; locuslab published the same weights."""
