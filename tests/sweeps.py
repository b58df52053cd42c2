"""Sweeps: a few points for every run, all of them for ``make test-all``."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["sparse"]


def sparse(
    values: Iterable[Any], keep: Callable[[Any], bool], ids: Callable[[Any], str] | None = None
) -> list[Any]:
    """Return the points of a sweep; those that are not kept are marked ``exhaustive``.

    Args:
        values: of one parameter of a test, or tuples of several.
        keep: whether a point stands for the others of its kind: it runs in ``make test`` too.
        ids: names a point; None leaves that to pytest.
    """
    points = []
    for value in values:
        marks = [] if keep(value) else [pytest.mark.exhaustive]
        fields = value if type(value) is tuple else (value,)
        points.append(pytest.param(*fields, marks=marks, id=ids(value) if ids else None))
    return points
