"""The public fused ops: every live backend against the reference in float64, and the checks."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convmixer_fast import BackendUnavailableError, InferenceOnlyError, ops
from convmixer_fast.activations import ACTIVATIONS
from convmixer_fast.reference import (
    depthwise_block_ref,
    patch_embed_ref,
    pointwise_block_ref,
)
from convmixer_fast.runtime import backends
from tests.tolerances import TOL

pytestmark = pytest.mark.device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter's own tests are in test_triton_kernels.py; here it would take minutes.
LIVE = [
    name
    for name in backends.BACKENDS
    if backends.why_not(name, DEVICE, torch.float32) is None
    and not (name == "triton" and DEVICE.type == "cpu")
]
REFERENCES = {
    "depthwise_block": depthwise_block_ref,
    "pointwise_block": pointwise_block_ref,
    "patch_embed": patch_embed_ref,
}
WEIGHTS = {
    "depthwise_block": lambda c, k: (c, 1, k, k),
    "pointwise_block": lambda c, k: (c + 3, c, 1, 1),
    "patch_embed": lambda c, k: (c + 3, c, k, k),
}


def arguments(op, channels=40, k=3, size=(13, 11), batch=2, dtype=torch.float32):
    """Return inputs whose sums have about unit variance, as trained ones have."""
    weight = torch.randn(WEIGHTS[op](channels, k))
    weight = weight / weight[0].numel() ** 0.5
    out = weight.shape[0]
    vectors = [torch.randn(out) * 0.3, torch.rand(out) + 0.5, torch.randn(out) * 0.3]
    x = torch.randn(batch, channels, *size)
    tensors = [x.to(dtype), weight.to(dtype), *vectors]
    return [t.to(DEVICE) for t in tensors]


def check(op, backend, args, **options):
    extra = [options.get("activation", "gelu")]
    if op == "depthwise_block":
        extra.append(options.get("residual", True))
    expected = REFERENCES[op](*(None if a is None else a.double() for a in args), *extra)
    out = getattr(ops, op)(*args, backend=backend, **options)
    assert out.is_contiguous()
    assert out.dtype == args[0].dtype
    torch.testing.assert_close(out.double(), expected, **TOL[args[0].dtype])


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("op", REFERENCES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_against_the_reference(op, backend, activation, dtype):
    check(op, backend, arguments(op, dtype=dtype), activation=activation)


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("k", range(1, 32, 2))
def test_every_kernel_size(backend, k):
    check("depthwise_block", backend, arguments("depthwise_block", channels=8, k=k))


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("given_ones", ["", "bias", "scale", "shift", "bias,shift"])
@pytest.mark.parametrize("op", REFERENCES)
def test_optional_vectors(op, backend, given_ones):
    x, weight, *vectors = arguments(op)
    names = ("bias", "scale", "shift")
    kept = [v if n in given_ones.split(",") else None for n, v in zip(names, vectors, strict=True)]
    check(op, backend, [x, weight, *kept])


@pytest.mark.parametrize("backend", LIVE)
def test_without_residual(backend):
    check("depthwise_block", backend, arguments("depthwise_block"), residual=False)


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("op", REFERENCES)
def test_strided_inputs(op, backend):
    x, *rest = arguments(op)
    wide = torch.randn(2, 100, 26, 11, device=DEVICE)
    for view in (x.to(memory_format=torch.channels_last), wide[:, 30:70, ::2], x.transpose(2, 3)):
        check(op, backend, [view, *rest])


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("op", REFERENCES)
def test_batch_of_none(op, backend):
    check(op, backend, arguments(op, batch=0))


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("patch", [(1, 1), (2, 5), (7, 7), (13, 11)])
def test_patches_of_any_shape(backend, patch):
    x, _, *vectors = arguments("patch_embed")
    weight = torch.randn(43, 40, *patch, device=DEVICE) / (40 * patch[0] * patch[1]) ** 0.5
    check("patch_embed", backend, [x, weight, *vectors])


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", REFERENCES)
def test_nan_and_infinity(op, backend, activation, value):
    args = arguments(op)
    args[0][1, 3, 4, 5] = value
    out = getattr(ops, op)(*args, activation=activation, backend=backend)
    extra = (activation, True) if op == "depthwise_block" else (activation,)
    # In float64: in float32, PyTorch's own vectorised GELU turns infinity into NaN, and the
    # reference backend with it.
    expected = REFERENCES[op](*(a.double() for a in args), *extra)
    kinds = (torch.isnan, torch.isposinf, torch.isneginf)
    for test in (torch.isfinite,) if backend == "reference" else kinds:
        assert torch.equal(test(out), test(expected)), test


@pytest.mark.parametrize("backend", LIVE)
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    op=st.sampled_from(sorted(REFERENCES)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    batch=st.integers(1, 3),
    channels=st.integers(1, 70),
    k=st.sampled_from([1, 3, 5, 7, 9]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
)
def test_any_shape(backend, op, activation, batch, channels, k, height, width):
    if op == "patch_embed":
        k = min(k, height, width)
    args = arguments(op, channels, k, (height, width), batch)
    check(op, backend, args, activation=activation)


@pytest.mark.parametrize("op", REFERENCES)
def test_docstring_equivalents(op):
    """The plain PyTorch lines that the docstrings promise."""
    x, weight, bias, scale, shift = arguments(op)
    options = {
        "depthwise_block": {"padding": 1, "groups": 40},
        "pointwise_block": {},
        "patch_embed": {"stride": (3, 3)},
    }[op]
    y = F.gelu(F.conv2d(x, weight, bias, **options))
    y = y * scale[:, None, None] + shift[:, None, None]
    y = y + x if op == "depthwise_block" else y
    torch.testing.assert_close(getattr(ops, op)(x, weight, bias, scale, shift), y)


@pytest.mark.parametrize("backend", LIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", REFERENCES)
def test_opcheck(op, backend, dtype):
    args = arguments(op, channels=6, size=(9, 8), dtype=dtype)
    args[0] = args[0].to(memory_format=torch.channels_last)
    extra = ("gelu", True, backend) if op == "depthwise_block" else ("gelu", backend)
    torch.library.opcheck(getattr(torch.ops.convmixer_fast, op).default, (*args, *extra))
    args[2] = args[4] = None
    torch.library.opcheck(getattr(torch.ops.convmixer_fast, op).default, (*args, *extra))


@pytest.mark.parametrize("op", REFERENCES)
def test_autocast_casts_as_conv2d_does(op):
    args = arguments(op)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = getattr(ops, op)(*args)
    assert out.dtype == torch.bfloat16
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert getattr(ops, op)(*(a.double() for a in args), backend="reference").dtype == (
            torch.float64
        )


@pytest.mark.parametrize("op", REFERENCES)
def test_autocast_leaves_integers_to_the_check(op):
    x, *rest = arguments(op)
    with (
        torch.autocast(DEVICE.type, torch.bfloat16),
        pytest.raises(TypeError, match=r"floating-point.*got torch\.int64"),
    ):
        getattr(ops, op)(x.long(), *rest)


BAD = {
    "x 3-D": (lambda a: [a[0][0], *a[1:]], ValueError, r"x must be \(N, C, H, W\), got 3"),
    "gradient of bias": (
        lambda a: [*a[:2], a[2].clone().requires_grad_(), *a[3:]],
        InferenceOnlyError,
        "has no backward pass",
    ),
    "empty kernel": (lambda a: [a[0], a[1][..., :0], *a[2:]], ValueError, "none of them 0"),
    "weight 3-D": (lambda a: [a[0], a[1][0], *a[2:]], ValueError, "weight must have 4 dimensions"),
    "x integer": (lambda a: [a[0].long(), *a[1:]], TypeError, r"floating-point.*got torch\.int64"),
    "mixed dtypes": (lambda a: [a[0].half(), *a[1:]], TypeError, "must have one dtype"),
    "mixed devices": (lambda a: [a[0], a[1].to("meta"), *a[2:]], ValueError, "on one device"),
    "channels": (
        lambda a: [a[0][:, :5], *a[1:]],
        ValueError,
        r"must be \(C.*=5.*got|must have 40 channels",
    ),
    "bias shape": (lambda a: [*a[:2], a[2][:3], *a[3:]], ValueError, r"bias must be \(\d+,\)"),
    "scale dtype": (
        lambda a: [*a[:3], a[3].half(), a[4]],
        TypeError,
        "scale must be float32 or of the dtype of x",
    ),
    "shift device": (lambda a: [*a[:4], a[4].to("meta")], ValueError, "x and shift must be on one"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("op", REFERENCES)
def test_bad_arguments_are_named(op, case):
    spoil, error, message = BAD[case]
    with pytest.raises(error, match=f"{op}.*(?:{message})"):
        getattr(ops, op)(*spoil(arguments(op)))


def test_shapes_that_one_op_refuses():
    x, weight, *_ = arguments("depthwise_block")
    with pytest.raises(ValueError, match=r"must be \(C, 1, K, K\) with C=40, got \(40, 1, 3"):
        ops.depthwise_block(x, weight[..., :2])
    with pytest.raises(ValueError, match="kernel size must be odd, got 2.*pad an even kernel"):
        ops.depthwise_block(x, weight[..., :2, :2])
    with pytest.raises(ValueError, match=r"weight must be \(C_out, C_in, 1, 1\) with C_in=40"):
        ops.pointwise_block(x, weight)
    x, weight, *_ = arguments("patch_embed")
    with pytest.raises(ValueError, match="smaller than one patch: it is 13 x 2, and a patch 3 x 3"):
        ops.patch_embed(x[..., :2], weight)


@pytest.mark.parametrize("op", REFERENCES)
def test_other_refusals(op):
    args = arguments(op)
    function = getattr(ops, op)
    with pytest.raises(ValueError, match="activation must be one of 'gelu'.*got 'mish'"):
        function(*args, activation="mish")
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of.*got 'cuda'"):
        function(*args, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="'cpu' cannot run torch.float64"):
        function(*(a.double() for a in args), backend="cpu")
    args[0].requires_grad_()
    with pytest.raises(InferenceOnlyError, match=f"{op} has no backward pass.*inference_mode"):
        function(*args)
    with torch.no_grad():
        function(*args)


def _free_gib():
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0.0
    return int(text.partition("MemAvailable:")[2].split()[0]) / 2**20


@pytest.mark.exhaustive
@pytest.mark.skipif(_free_gib() < 30, reason="needs 30 GiB of free memory")
@pytest.mark.parametrize("op", ["pointwise", "depthwise"])
def test_more_elements_than_32_bits_count(op):
    height, width = 2**16, 2**15 + 8
    x = torch.zeros(1, 1, height, width)
    assert x.numel() > 2**31
    x[0, 0, -1, -3:] = torch.tensor([1.0, 2.0, 3.0])
    x[0, 0, height // 2, 7] = 9
    with torch.inference_mode():
        if op == "pointwise":
            weight, bias = torch.full((1, 1, 1, 1), 2.0), torch.ones(1)
            y = ops.pointwise_block(x, weight, bias, activation="relu", backend="cpu")
            last, middle = [1, 3, 5, 7], [1, 19, 1]
        else:
            weight = torch.ones(1, 1, 3, 3)
            y = ops.depthwise_block(x, weight, activation="relu", residual=False, backend="cpu")
            last, middle = [1, 3, 6, 5], [9, 9, 9]
    assert y[0, 0, -1, -4:].tolist() == last
    assert y[0, 0, height // 2, 6:9].tolist() == middle
