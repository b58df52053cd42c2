"""How the tests are run: which of them, and where."""

import pytest

from tests.sweeps import sparse


@pytest.mark.xdist_group("of_its_own")
def test_a_group_runs_in_one_worker(request):
    """Else each worker compiles, for itself, what the tests of a group share."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("needs pytest-xdist: make test, or pytest -n 2 --dist loadgroup")
    assert request.node.nodeid.endswith("@of_its_own")


def test_points_that_are_not_kept_are_exhaustive():
    points = sparse([1, 2, 3], lambda value: value == 2, ids=lambda value: f"point {value}")
    assert [[mark.name for mark in point.marks] for point in points] == [
        ["exhaustive"],
        [],
        ["exhaustive"],
    ]
    assert [point.id for point in points] == ["point 1", "point 2", "point 3"]


def test_a_tuple_is_several_parameters():
    assert [point.values for point in sparse([(1, "a"), 2], lambda value: True)] == [(1, "a"), (2,)]
