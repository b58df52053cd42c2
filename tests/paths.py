"""Where the checkout that is tested lies."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "convmixer_fast" / "data" / "digits.safetensors"
"""The checkpoint that ships with the package."""
