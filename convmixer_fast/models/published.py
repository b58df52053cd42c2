"""The ConvMixers whose trained weights are published, by what determines them."""

from dataclasses import dataclass

from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.models.convmixer import ConvMixer

# Not used here: pickles made with 0.1 look for it in this module.
from convmixer_fast.models.preprocessing import Preprocessing  # noqa: F401

__all__ = ["PUBLISHED", "Architecture"]


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
            ValueError: ``activation`` is not in :data:`activations.ACTIVATIONS`, or a size wrong.
        """
        if self.activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation must be one of {known}, got {self.activation!r}")
        return ConvMixer(
            self.dim,
            self.depth,
            kernel_size=self.kernel_size,
            patch_size=self.patch_size,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
            global_pool=self.global_pool,
            act_layer=ACTIVATIONS[self.activation].layer,
        ).eval()


PUBLISHED = {
    "convmixer_1536_20": Architecture(1536, 20, 9, 7, "gelu"),
    # Trained with ReLU, by the authors and so in timm; its weights do not show it.
    "convmixer_768_32": Architecture(768, 32, 7, 7, "relu"),
    "convmixer_1024_20_ks9_p14": Architecture(1024, 20, 9, 14, "gelu"),
}
"""By timm's names; locuslab published the same weights."""
