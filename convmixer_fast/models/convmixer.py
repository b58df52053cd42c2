"""ConvMixer in plain PyTorch: the trainable model, and the interface that its fused form keeps.

Submodules and methods carry timm's names, so that timm's state_dicts load
unchanged and code written for timm's ConvMixer runs on either class.
Source: "Patches Are All You Need?", arXiv 2201.09792.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["POOLS", "ConvMixer", "ConvMixerInterface", "GlobalPool"]


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
    "avgmax": lambda x: 0.5 * (x.mean((2, 3)) + x.amax((2, 3))),
    "catavgmax": lambda x: torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1),
    "": lambda x: x,
}
"""timm's global pooling kinds: (N, C, H, W) -> (N, F); the empty name keeps the map as it is."""


class GlobalPool(nn.Module):
    """Pool (N, C, H, W) over its positions to (N, F) in one of the kinds of :data:`POOLS`.

    Raises:
        ValueError: ``pool_type`` is not one of :data:`POOLS`.
    """

    def __init__(self, pool_type: str = "avg") -> None:
        super().__init__()
        if pool_type not in POOLS:
            known = ", ".join(map(repr, POOLS))
            raise ValueError(f"global_pool must be one of {known}, got {pool_type!r}")
        self.pool_type = pool_type

    def feat_mult(self) -> int:
        """Return how many features each channel becomes."""
        return 2 if self.pool_type == "catavgmax" else 1

    def forward(self, x: Tensor) -> Tensor:
        """Pool ``x``."""
        return POOLS[self.pool_type](x)

    def extra_repr(self) -> str:
        """Return the kind of pooling."""
        return f"pool_type={self.pool_type!r}"


class ConvMixerInterface(nn.Module):
    """The methods of timm's ConvMixer, over submodules that a subclass provides.

    A subclass sets ``stem`` (N, in_chans, H, W) -> (N, dim, H', W'), ``blocks`` (an
    ``nn.Sequential`` of layers that keep that shape) and ``num_features``, then
    calls :meth:`_set_head`.
    """

    stem: nn.Module
    blocks: nn.Sequential
    global_pool: GlobalPool
    head_drop: nn.Module
    head: nn.Module
    in_chans: int
    num_features: int
    head_hidden_size: int
    num_classes: int

    def _set_head(self, global_pool: str, num_classes: int, head: nn.Module | None = None) -> None:
        """Set pooling and classifier; a newly initialised one where ``head`` is None."""
        self.num_classes = num_classes
        self.global_pool = GlobalPool(global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if head is None and num_classes > 0:
            like = next(self.stem.parameters())
            head = nn.Linear(
                self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype
            )
        self.head = nn.Identity() if head is None else head

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to the last layer's features (N, dim, H', W')."""
        features: Tensor = self.blocks(self.stem(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features (N, dim, H', W') to logits, or with ``pre_logits`` to pooled features."""
        x = self.head_drop(self.global_pool(x))
        if pre_logits:
            return x
        logits: Tensor = self.head(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the features and the outputs of chosen layers, as timm's method does.

        Args:
            x: images (N, in_chans, H, W).
            indices: the last n layers if an int, all if None, else the layers' indices.
            norm: there is no final norm, so this changes nothing.
            stop_early: do not run the layers after the last chosen one.
            output_fmt: must be ``"NCHW"``.
            intermediates_only: return the list alone.

        Raises:
            ValueError: an index is out of range, or ``output_fmt`` is another one.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        chosen = self._layer_indices(indices)
        last = max(chosen, default=-1) if stop_early else len(self.blocks) - 1
        steps = sorted({*(index + 1 for index in chosen), last + 1})
        found = dict(zip(steps, self._run_steps(x, steps), strict=True))
        intermediates = [found[index + 1] for index in sorted(chosen)]
        return intermediates if intermediates_only else (found[last + 1], intermediates)

    def _run_steps(self, x: Tensor, steps: Sequence[int]) -> list[Tensor]:
        """Return the outputs of rising steps, 0 the stem, n layer n; later ones are not run."""
        x = self.stem(x)
        outs = [x] if 0 in steps else []
        for step, layer in enumerate(islice(self.blocks, steps[-1]), 1):
            x = layer(x)
            if step in steps:
                outs.append(x)
        return outs

    def _layer_indices(self, indices: int | Sequence[int] | None) -> set[int]:
        depth = len(self.blocks)
        if indices is None:
            return set(range(depth))
        if isinstance(indices, int):
            if not 0 < indices <= depth:
                raise ValueError(f"indices must be from 1 to {depth} layers, got {indices}")
            return set(range(depth - indices, depth))
        wrong = [index for index in indices if not -depth <= index < depth]
        if wrong:
            raise ValueError(f"layer indices must be within {depth} layers, got {wrong}")
        return {index % depth for index in indices}

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, pixels a position, and name of each layer, as timm's wrappers ask for them."""
        patch = next(p.shape[2] for p in self.stem.parameters() if p.dim() == 4)
        return [
            {"num_chs": _channels_out(layer), "reduction": patch, "module": f"blocks.{index}"}
            for index, layer in enumerate(self.blocks)
        ]

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the layers behind the last chosen one and, with ``prune_head``, the head.

        Returns:
            The chosen layers' indices, as :meth:`forward_intermediates` takes them.
        """
        chosen = sorted(self._layer_indices(indices))
        self.blocks = nn.Sequential(*islice(self.blocks, chosen[-1] + 1))
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer, or an ``nn.Identity`` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a newly initialised one; 0 classes leave the pooled features."""
        kept = self.global_pool.pool_type
        self._set_head(kept if global_pool is None else global_pool, num_classes)


def _channels_out(layer: nn.Module) -> int:
    *_, last = (parameter for parameter in layer.parameters() if parameter.dim() == 4)
    return last.shape[0]


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fn(x)
        return y + x


class ConvMixer(ConvMixerInterface):
    """The reference ConvMixer: pure PyTorch, trainable, with timm's names.

    Args:
        dim: channels of every layer.
        depth: number of layers.
        kernel_size: side of the depthwise kernels.
        patch_size: side of a patch, in pixels.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for pooled features.
        global_pool: one of :data:`POOLS`.
        drop_rate: dropout before the head, in training.
        act_layer: makes the activation module, e.g. ``nn.GELU`` or ``nn.ReLU``.

    Raises:
        ValueError: ``global_pool`` is unknown, or a size is negative, or 0 where that is no model.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        at_least = {
            "dim": (dim, 1),
            "depth": (depth, 0),
            "kernel_size": (kernel_size, 1),
            "patch_size": (patch_size, 1),
            "in_chans": (in_chans, 1),
            "num_classes": (num_classes, 0),
        }
        for name, (size, least) in at_least.items():
            if size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")
        self.in_chans = in_chans
        self.num_features = dim

        def block(conv: nn.Conv2d) -> list[nn.Module]:
            return [conv, act_layer(), nn.BatchNorm2d(dim)]

        def layer() -> nn.Sequential:
            depthwise = nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same")
            return nn.Sequential(
                _Residual(nn.Sequential(*block(depthwise))),
                *block(nn.Conv2d(dim, dim, kernel_size=1)),
            )

        self.stem = nn.Sequential(*block(nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)))
        self.blocks = nn.Sequential(*(layer() for _ in range(depth)))
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(global_pool, num_classes)
