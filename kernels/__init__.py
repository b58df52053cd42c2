"""Triton kernels of the fused ops: one file per op, with its configurations as data.

Installed as ``convmixer_fast.kernels``. Importing it needs Triton and no device. The
trunk runs one after another for the engine. The launchers take the arguments of the
functions in :mod:`convmixer_fast.reference`, already checked by :mod:`convmixer_fast.ops`.
"""

from convmixer_fast.kernels.depthwise_block import depthwise_block_triton
from convmixer_fast.kernels.patch_embed import patch_embed_triton
from convmixer_fast.kernels.pointwise_block import pointwise_block_triton
from convmixer_fast.kernels.trunk import TritonTrunk

__all__ = [
    "TritonTrunk",
    "depthwise_block_triton",
    "patch_embed_triton",
    "pointwise_block_triton",
]
