"""The roofline of this machine, measured: copy bandwidth and the rate of a large matrix product."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from convmixer_fast.runtime.backends import cpu_rates
from convmixer_fast.support.timing import Measure, cuda_events, interleave, wall_clock

__all__ = ["Ceilings", "measure_ceilings"]

_ROUNDS = 20
"""Of milliseconds each: clocks vary."""


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run as what is compared with them."""

    bytes_per_s: float
    """Of a large copy, bytes read and bytes written counted."""
    flop_per_s: dict[str, float]
    """Of a large square matrix product on random data, by dtype; on a CPU of multiplications and
    additions in registers where that is more, and so of int8 and bfloat16 too."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data; ``Ceilings(**data)`` is the way back."""
        return asdict(self)


def measure_ceilings(
    device: torch.device, dtypes: list[torch.dtype], *, seconds: float = 2.0
) -> Ceilings:
    """Measure the ceilings of ``device``, the fastest fifth of the calls being taken.

    Args:
        device: a CPU or a CUDA device.
        dtypes: of the matrix products; float32 follows PyTorch's TF32 switch for convolutions.
        seconds: of measuring, for each ceiling.
    """
    cuda = device.type == "cuda"
    measure = cuda_events(device) if cuda else wall_clock
    elements = 2**28 if cuda else 2**26
    bytes_per_s = _copy_rate(torch.randn(elements, device=device), seconds, measure)
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    conv: Any = torch.backends.cudnn
    matmul.allow_tf32 = conv.conv.fp32_precision == "tf32"
    try:
        rates = {}
        for dtype in dtypes:
            # Many CPUs have no 16-bit arithmetic, and take a thousand times as long.
            size = 8192 if cuda else 2048 if dtype == torch.float32 else 256
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            rates[str(dtype).removeprefix("torch.")] = (
                2 * size**3 / _fastest(a, b, out, seconds, measure)
            )
    finally:
        matmul.allow_tf32 = before
    if not cuda:
        for _ in range(_ROUNDS):
            for name, rate in cpu_rates(torch.get_num_threads()).items():
                rates[name] = max(rate, rates.get(name, 0.0))
        # Smaller numbers may be computed in float32, which some processors do faster.
        for name in rates:
            rates[name] = max(rates[name], rates.get("float32", 0.0))
    return Ceilings(bytes_per_s, rates)


def _copy_rate(source: Tensor, seconds: float, measure: Measure) -> float:
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    copy = interleave(calls, budget_s=seconds, min_rounds=5, measure=measure)
    return 2 * source.nbytes / copy.quantile("copy", 0.2)


def _fastest(a: Tensor, b: Tensor, out: Tensor, seconds: float, measure: Measure) -> float:
    calls = {"product": lambda: torch.mm(a, b, out=out)}
    product = interleave(calls, budget_s=seconds, min_rounds=5, measure=measure)
    return product.quantile("product", 0.2)
