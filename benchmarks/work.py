"""What a computation must do at least: floating-point operations and bytes of memory traffic."""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convmixer_fast.spec import ConvMixerSpec, Head

if TYPE_CHECKING:
    from convmixer_fast.benchmarks.ceilings import Ceilings

__all__ = ["Step", "Work", "block_step", "counted_flops", "model_steps"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One pass over memory: an op that reads its inputs once and writes its output once."""

    flops: float
    """Of the convolution or product alone, 2 for a multiplication and an addition."""
    bytes: float
    """Input, output and weights, each moved once."""


@dataclass(frozen=True)
class Work:
    """The steps of one call."""

    steps: tuple[Step, ...]
    images: int

    @property
    def flops(self) -> float:
        """Floating-point operations of all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def bytes(self) -> float:
        """Bytes moved by all steps."""
        return sum(step.bytes for step in self.steps)

    def floor_s(self, ceilings: "Ceilings", dtype: str) -> float:
        """Return the seconds below which steps run one after the other cannot come.

        Each takes the longer of moving its bytes at the copy bandwidth and doing its
        operations at the rate of a large matrix product. Where a cache keeps what one step
        writes for the next to read, a call can be faster than this.
        """
        rate = ceilings.flop_per_s[dtype]
        return sum(max(step.bytes / ceilings.bytes_per_s, step.flops / rate) for step in self.steps)


def block_step(
    weight: Shape, x: Shape, itemsize: int, *, stride: Shape = (1, 1)
) -> tuple[Step, Shape]:
    """Return the step of a convolution block, and the shape of its output.

    Args:
        weight: (C_out, C_in / groups, K_h, K_w).
        x: (N, C_in, H, W); zero-padded to the same size unless there is a stride.
        itemsize: bytes of an element.
        stride: of the convolution; a patch embedding's is its kernel's size.
    """
    out = (x[0], weight[0], x[2] // stride[0], x[3] // stride[1])
    flops = 2 * prod(out) * prod(weight[1:])
    return Step(flops, itemsize * (prod(x) + prod(out) + prod(weight))), out


def model_steps(spec: ConvMixerSpec, image: Shape, itemsize: int) -> tuple[Step, ...]:
    """Return the steps of a ConvMixer: stem, two a layer, and a plain head's linear layer.

    Args:
        spec: what :func:`recognize` returned.
        image: (N, C, H, W) of the stem's input.
        itemsize: bytes of an element.
    """
    patch = spec.stem.weight.shape
    step, x = block_step(tuple(patch), image, itemsize, stride=tuple(patch[2:]))
    steps = [step]
    for layer in spec.layers:
        for block in (layer.depthwise, layer.pointwise):
            step, x = block_step(tuple(block.weight.shape), x, itemsize)
            steps.append(step)
    if isinstance(spec.head, Head) and spec.head.weight is not None:
        classes, features = spec.head.weight.shape
        moved = prod(x) + classes * (features + x[0])
        steps.append(Step(2 * x[0] * features * classes, itemsize * moved))
    return tuple(steps)


def counted_flops(model: nn.Module, x: Tensor) -> float:
    """Return the operations that PyTorch counts in ``model(x)``: for other models."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return float(counter.get_total_flops())
