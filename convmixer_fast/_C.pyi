"""Compiled CPU kernels, on addresses of packed float32 tensors; see csrc/bindings.cpp."""

BLOCK: int
PANEL: int

# Addresses of weight, bias, scale and shift; the activation's number, 0 for none.
_Packed = tuple[int, int, int, int, int]
# How many numbers make a word: 1, 2 of bfloat16, 4 of 8 bits; of these the address of the sums'
# scales, one over the input's scale, its zero point.
_Numbers = tuple[int, int, float, int]

def isa() -> str: ...
def rates(threads: int) -> dict[str, float]: ...
def pack(matrix: int, rows: int, depth: int, lanes: int, packed: int, threads: int) -> None: ...
def depthwise_block(
    packed: _Packed,
    channels: int,
    kernel_size: int,
    residual: bool,
    x: int,
    out: int,
    images: int,
    height: int,
    width: int,
    threads: int,
) -> None: ...
def product_block(
    packed: _Packed,
    channels_out: int,
    x: int,
    out: int,
    images: int,
    channels: int,
    height: int,
    width: int,
    patch_h: int,
    patch_w: int,
    threads: int,
) -> None: ...

class Trunk:
    def __init__(
        self,
        stem: _Packed,
        channels: int,
        patch_h: int,
        patch_w: int,
        channels_out: int,
        numbers: _Numbers | None = None,
    ) -> None: ...
    def add_layer(
        self,
        depthwise: _Packed,
        kernel_size: int,
        pointwise: _Packed,
        channels_out: int,
        numbers: _Numbers | None = None,
    ) -> None: ...
    def set_head(self, head: _Packed, channels_out: int) -> None: ...
    def run(
        self, x: int, out: int, images: int, height: int, width: int, result: int, threads: int
    ) -> None: ...
    def run_intermediates(
        self, x: int, outs: list[int], images: int, height: int, width: int, threads: int
    ) -> None: ...

class Samples:
    def __init__(self, addresses: list[int], sizes: list[int]) -> None: ...
    def unchanged(self) -> bool: ...
