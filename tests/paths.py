"""Where the checkout that is tested lies."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "convmixer_fast" / "data" / "digits.safetensors"
"""The checkpoint that ships with the package."""

TRITON_CACHE = ROOT / "build" / "triton"
"""Where Triton keeps what the tests compile, by a digest of the source."""
