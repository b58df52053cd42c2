"""Every tile of the Triton kernels computes the same, and every shape has one.

On a CUDA machine those that run on the device; elsewhere all, in Triton's interpreter.
"""

from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from convmixer_fast import reference
from convmixer_fast.kernels import (
    depthwise_block,
    depthwise_block_triton,
    launch,
    pointwise_block,
    pointwise_block_triton,
    pointwise_tma,
)
from convmixer_fast.kernels.depthwise_direct import DirectTile
from convmixer_fast.kernels.depthwise_toeplitz import ToeplitzTile
from convmixer_fast.kernels.pointwise_tma import TmaTile, suits_tma, tma_launch
from tests.kernels.triton_cases import (
    DEVICE,
    DTYPES,
    TF32_ERROR,
    check,
    depthwise_args,
    make_vectors,
    pointwise_args,
    poisoned_outputs,  # noqa: F401 (a fixture for every test)
)
from tests.sweeps import sparse
from tests.tolerances import TOL

# NumPy, in the interpreter, warns of what the kernels do on purpose at the dtypes' limits.
pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


def _every_tile(configs: tuple[Any, ...]) -> Any:
    """Each row's tile, of the rows that run on this device: the interpreter has all of them.

    Those for long kernels take it seconds.
    """
    tiles = {row.tile: row for row in configs}
    if DEVICE.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        every = (0, 1000)
        tiles = {
            tile: row
            for tile, row in tiles.items()
            if (limits := getattr(row, "capabilities", every))[0] <= 10 * major + minor < limits[1]
        }
    ids = [f"{type(tile).__name__}-{'-'.join(map(str, tile))}" for tile in tiles]
    short = [getattr(tile, "unrolled_taps", None) is None for tile in tiles]
    rows = [
        pytest.param(row, id=name, marks=[] if quick else [pytest.mark.exhaustive])
        for row, name, quick in zip(tiles.values(), ids, short, strict=True)
    ]
    return pytest.mark.parametrize("row", rows)


@_every_tile(depthwise_block.CONFIGS)
@pytest.mark.parametrize(
    "shape",
    sparse(
        [((1, 3, 5, 70),), ((2, 5, 19, 3),), ((9, 2, 17, 16),)],
        ((2, 5, 19, 3),).__eq__,
        ids=lambda point: "x".join(map(str, *point)),
    ),
)
def test_every_depthwise_config(
    row: depthwise_block.Config, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise_block, "choose_config", lambda *_: row)
    kernel_size = int(min(row.max_kernel_size, 17))
    x, weight = depthwise_args(shape, kernel_size, torch.float16)
    check(depthwise_block_triton, x, weight, *make_vectors(shape[1]), "gelu", True)


@pytest.mark.parametrize(("height", "width"), sparse([(1, 1), (2, 23)], (1, 1).__eq__))
def test_largest_kernel(height: int, width: int) -> None:
    x, weight = depthwise_args((1, 2, height, width), 31, torch.float32)
    check(depthwise_block_triton, x, weight, *make_vectors(2), "relu", True)


@_every_tile(pointwise_block.CONFIGS)
@pytest.mark.parametrize(
    ("shape", "channels_out"),
    sparse(
        [
            ((2, 72, 8, 9), 150),
            ((2, 584, 8, 16), 150),  # more steps than a pipeline has stages
            ((2, 70, 13, 11), 150),
            ((1, 1, 1, 17), 1),
            ((3, 129, 1, 1), 64),
        ],
        lambda point: point[1] == 150 and point[0][1] < 500,
    ),
)
def test_every_pointwise_config(
    row: pointwise_block.Config,
    shape: tuple[int, ...],
    channels_out: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pointwise_block, "choose_config", lambda *_: row)
    if row.operands == "tf32":
        monkeypatch.setattr(pointwise_block, "fp32_input_precision", lambda: "tf32")
    for dtype in (torch.float16, torch.bfloat16) if row.operands == "16-bit" else (torch.float32,):
        x, weight = pointwise_args(shape, channels_out, dtype)
        if isinstance(row.tile, TmaTile) and not suits_tma(
            x.flatten(2), weight.reshape(channels_out, -1)
        ):
            pytest.skip("needs sizes that the TMA takes")
        if row.operands == "tf32" and DEVICE.type == "cuda":
            out = pointwise_block_triton(x, weight, None, None, None, "gelu")
            exact = reference.pointwise_block_ref(
                x.double(), weight.double(), None, None, None, "gelu"
            )
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=TF32_ERROR)
        else:
            check(pointwise_block_triton, x, weight, *make_vectors(channels_out), "gelu")


@pytest.mark.parametrize("persistent", [False, True], ids=["tiles", "persistent"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_tma(persistent: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise_tma, "_multiprocessors", lambda x: 2)  # several tiles each
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    x, weight = pointwise_args((3, 72, 8, 9), 150, dtype)
    vectors = make_vectors(150)
    out = torch.empty((3, 150, 8, 9), dtype=dtype, device=DEVICE)
    tile = TmaTile(64, 64, 32, persistent, 4, 3)
    tma_launch(x.flatten(2), weight.flatten(1), launch.Epilogue(*vectors, "gelu"), out, tile).run()
    exact = reference.pointwise_block_ref(
        x.cpu().double(),
        weight.cpu().double(),
        *(vector.cpu().double() for vector in vectors),
        "gelu",
    )
    torch.testing.assert_close(out.cpu().double(), exact, **TOL[dtype])


def test_configs_cover_every_shape() -> None:
    for dtype, kernel_size, images, height, width in product(
        DTYPES, (1, 9, 11, 15, 31, 63), (1, 256), (1, 9, 1000), (1, 17, 36, 1000)
    ):
        x = torch.zeros((), dtype=dtype).expand(images, 768, height, width)
        row = depthwise_block.choose_config(x, kernel_size)
        assert kernel_size <= row.max_kernel_size
        assert height <= row.max_height
        assert width <= row.max_width
        largest = 15 if width % 4 == 0 else 9
        toeplitz = dtype != torch.float32 and kernel_size <= largest and width >= 4
        assert isinstance(row.tile, ToeplitzTile) == toeplitz
        if isinstance(row.tile, ToeplitzTile):
            assert row.tile.programs(kernel_size, x.shape) >= row.min_programs
    for device, operands, aligned, tma, images, positions in product(
        (80, 86, 89, 90, 100, 120),
        ("16-bit", "tf32", "ieee"),
        (True, False),
        (True, False),
        (1, 1000),
        (1, 49, 10**6),
    ):
        row = pointwise_block.choose_config(device, operands, aligned, tma, images, 768, positions)
        assert row.operands == operands
        assert positions >= row.min_positions
        if isinstance(row.tile, TmaTile):
            assert tma
            assert device in (90, 100)
        else:
            assert aligned or not row.aligned


def test_offsets_of_a_large_plane_are_for_the_direct_kernel() -> None:
    x = torch.zeros((), dtype=torch.float16).expand(1, 1, 2**16, 2**15)
    assert isinstance(depthwise_block.choose_config(x, 7).tile, DirectTile)
    assert isinstance(depthwise_block.choose_config(x[:, :, 1:], 7).tile, ToeplitzTile)


@pytest.mark.parametrize("height", [1, 2, 7, 14, 16, 17, 18, 33, 36, 64])
@pytest.mark.parametrize("max_rows", [4, 8, 16])
def test_segments_of_rows(height: int, max_rows: int) -> None:
    rows = ToeplitzTile(16, max_rows).rows(height)
    assert rows <= max_rows
    assert rows % 2 == 0
    # No segment is empty, and those that there are waste less than two rows each.
    segments = -(-height // rows)
    assert segments == -(-height // max_rows)
    assert segments * rows - height < 2 * segments
