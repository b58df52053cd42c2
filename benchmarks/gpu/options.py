"""Options that several steps have. Without PyTorch, whose import takes seconds."""

import argparse

__all__ = ["add_batch_options", "batch_arguments"]


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which batches a sweep is of."""
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--only", default="", help="batches with this in their name: pointwise")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, tiny")


def batch_arguments(dtype: str, only: str) -> list[str]:
    """Return the command line of those but ``--rehearse``."""
    return ["--dtype", dtype, "--only", only]
